"""How many steps lie between two saves: as the run says, or chosen from what a save costs and how often runs fail.

J. W. Young, "A first order approximation to the optimum checkpoint interval" (CACM 17(9), 1974): a run that loses C
seconds per save and fails every M seconds on average loses least when it saves every T = sqrt(2 C M) seconds: T spends
C / T of the time on saves, and a failure loses T / 2 on average.
"""

import math
import time

FIRST = 50  # steps between saves until one was measured


def young(stall: float, mtbf: float) -> float:
    """The best seconds between two saves that stop training for `stall` seconds, at a failure every `mtbf` seconds."""
    return math.sqrt(2.0 * stall * mtbf)


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
        """What this rank would choose now, in steps; at least twice the time that a save takes to be written."""
        if self.chosen and self._per_step and self.stall > 0:
            seconds = max(young(self.stall, self._mtbf), 2.0 * (self.stall + self.write))
            self._wanted = max(1, round(seconds / self._per_step))
        return self._wanted
