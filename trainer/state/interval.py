"""How many steps lie between two saves: as the run says, or chosen from what a save costs and how often runs fail.

J. W. Young, "A first order approximation to the optimum checkpoint interval" (CACM 17(9), 1974): a run that loses C
seconds per save and fails every M seconds on average loses least when it saves every T = sqrt(2 C M) seconds: T spends
C / T of the time on saves, and a failure loses T / 2 on average. C is the stall, and of the time in which a save is
written beside training a share: it takes memory, a core and the disk from it.
"""

import math
import time

FIRST = 50  # steps between saves until one was measured
SLOWED = 0.02  # by which training is slower while a save is written; an assumption


def cost(stall: float, write: float) -> float:
    """Seconds that a save costs training, that stops it for `stall` and is written beside it for `write` seconds."""
    return stall + SLOWED * write


def young(cost: float, mtbf: float) -> float:
    """The best seconds between two saves that cost training `cost` seconds each, at a failure every `mtbf` seconds."""
    return math.sqrt(2.0 * cost * mtbf)


def between(stall: float, write: float, mtbf: float) -> float:
    """Seconds to have between two saves; at least twice what one takes to be written.

    Args:
        stall: seconds for which a save stops training.
        write: seconds in which it is written beside training.
        mtbf: seconds between two failures, on the average.
    """
    return max(young(cost(stall, write), mtbf), 2.0 * (stall + write))


class Interval:
    """Steps between two saves on one rank; all ranks take the first rank's choice whenever they save.

    Attributes:
        steps: in use.
        saved: the step of the last save.
    """

    def __init__(self, every: int, mtbf_hours: float) -> None:
        self.chosen = every == 0
        self.steps = every or FIRST
        self.saved = 0
        self.stall = self.write = 0.0
        self._mtbf = mtbf_hours * 3600.0
        self._wanted = self.steps
        self._per_step: float | None = None
        self._mark: tuple[int, float] | None = None

    def due(self, step: int) -> bool:
        """Whether a save is due after `step` updates."""
        if not self.chosen:
            return step % self.steps == 0
        return step - self.saved >= self.steps or step < self.saved  # below: training was rolled back

    def begin(self, step: int) -> None:
        """Training goes on behind `step`: steps are timed from now on."""
        self.saved, self._mark = step, (step, time.perf_counter())

    def end(self, step: int) -> None:
        """A save begins after `step`: the steps since `begin` are timed."""
        if self._mark is not None and step > self._mark[0]:
            self._per_step = (time.perf_counter() - self._mark[1]) / (step - self._mark[0])

    def measured(self, stall: float, write: float) -> None:
        """Take in what a save cost."""
        self.stall, self.write = stall, write

    def wanted(self) -> int:
        """What this rank would choose now, in steps."""
        if self.chosen and self._per_step and self.stall > 0:
            self._wanted = max(1, round(between(self.stall, self.write, self._mtbf) / self._per_step))
        return self._wanted
