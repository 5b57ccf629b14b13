"""What counts as unhealthy, from numbers that all ranks share: pure arithmetic, so that all ranks judge alike.

- nonfinite: the loss or the gradient of some rank is not finite.
- spike: the loss, a mean over the global batch, has a robust z-score above `guard.spike_z`: it lies so many times
  1.4826 MAD (median absolute deviation) above the median of the last healthy losses. A spread under 2 % of the median
  counts as 2 %, so that no score is made of rounding.
- explosion: the same of the logarithm of the gradient's norm before clipping; a spread under 0.1 counts as 0.1.
- divergence: `guard.divergence_steps` losses in a row lie above `guard.divergence_factor` times the best level (the
  lowest median of a whole window), and above that level by a quarter of what was gained since the first whole window,
  so that a loss near zero may waver; or `guard.nonfinite_steps` steps in a row were not finite.
- drift: tensors that all replicas of a stage hold have different checksums. The ranks outside the majority are named;
  without one, all of the stage.
- slow_rank: three steps running a rank computed `guard.slow_factor` times as long as the median of its stage's
  replicas (of two, as the other one).
- input_bound: over 50 steps the ranks waited for data more than `guard.input_share` of the time, on average.

A loss or norm above its limit enters the window as that limit: a single one moves nothing, a lasting change of level
is accepted in the end (unless its updates are left out).
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_low
from typing import Any, Literal, NamedTuple

from configs.guard import Guard

Kind = Literal["nonfinite", "spike", "explosion", "divergence", "drift", "slow_rank", "input_bound"]

SLOW_STEPS = 3
INPUT_STEPS = 50
NOT_COMPARED = -1.0
ROUNDING = 1e-5  # relative, of a loss that is held against its limit on the device


class Row(NamedTuple):
    """What one rank says of one step; numbers only, so that they travel in a tensor."""

    step: float
    loss: float  # mean over its replica's samples
    norm: float  # of the whole gradient before clipping, not finite where the update was left out for it
    healthy: float  # 1: the update was made
    block: float  # `evidence.Probes`: where nearest the loss this rank's gradient was not finite; 0: nowhere
    parameters: float  # checksum of what all replicas hold; NOT_COMPARED in most steps
    buffers: float  # the same of BatchNorm's statistics
    compute: float  # seconds this rank computed, without waiting
    waited: float  # seconds it waited for data
    wall: float  # seconds the step took


class Limits(NamedTuple):
    """From where on a step's loss and gradient norm are too large; infinite while nothing is known."""

    loss: float = math.inf
    norm: float = math.inf


@dataclass(frozen=True)
class Verdict:
    """Something is wrong.

    Attributes:
        kind: what.
        step: the one it was seen in: the number of updates when that was done.
        value: what was found.
        threshold: what it may be at most.
        ranks: whose fault it is, as far as the numbers tell.
        since: the step in which it began.
    """

    kind: Kind
    step: int
    value: float
    threshold: float
    ranks: tuple[int, ...] = ()
    since: int = 0


def limit(values: Sequence[float], z: float, floor: float) -> float:
    """The value with the robust z-score `z` among `values`, whose spread counts as `floor` at least."""
    middle = median(values)
    spread = 1.4826 * median([abs(value - middle) for value in values])
    return middle + z * max(spread, floor)


class Judge:
    """Judges the steps of a run, one after the other.

    Attributes:
        wish: the run's settings.
    """

    def __init__(self, wish: Guard, replicas: int, noise: float = 0.0) -> None:
        """Know nothing yet.

        Args:
            replicas: ranks of a stage.
            noise: seconds of computing that are no difference.
        """
        self.wish, self._replicas, self._noise = wish, replicas, noise
        self._losses: deque[float] = deque(maxlen=wish.window)
        self._norms: deque[float] = deque(maxlen=wish.window)  # their logarithms
        self._first = self._best = math.inf  # levels of the loss
        self._above = self._unhealthy = 0  # steps in a row
        self._equal = 0  # step in which the replicas were last found equal
        self._slow: Counter[int] = Counter()  # steps in a row, by rank
        self._waits: deque[tuple[float, float]] = deque(maxlen=INPUT_STEPS)  # (waited, wall)
        self._bound = False

    def limits(self) -> Limits:
        """The limits for the next step."""
        if len(self._losses) < self.wish.window / 4:
            return Limits()
        loss = limit(self._losses, self.wish.spike_z, 0.02 * abs(median(self._losses)))
        return Limits(loss, math.exp(min(700.0, limit(self._norms, self.wish.explosion_z, 0.1))))

    def judge(self, rows: Sequence[Row], limits: Limits) -> list[Verdict]:
        """What is wrong with a step.

        Args:
            rows: of all ranks in order.
            limits: that held for it.
        """
        return [*self._size(rows, limits), *self._drift(rows), *self._slow_ranks(rows), *self._input(rows)]

    def _size(self, rows: Sequence[Row], limits: Limits) -> Iterable[Verdict]:
        """Verdicts on loss and gradient."""
        step, loss, norm = int(rows[0].step), sum(row.loss for row in rows) / len(rows), rows[0].norm
        gated = loss > limits.loss  # false for NaN
        if not all(row.healthy for row in rows) or not math.isfinite(loss + norm):
            held = loss > limits.loss * (1 - ROUNDING)  # the gate adds the losses up in single precision
            if held and math.isfinite(loss) and self.wish.spike == "skip":  # why it was held back
                yield Verdict("spike", step, loss, limits.loss, since=step)
                return
            self._unhealthy += 1
            ranks = [rank for rank, row in enumerate(rows) if row.block or not math.isfinite(row.loss)]
            yield Verdict("nonfinite", step, norm if math.isfinite(loss) else loss, math.inf, tuple(ranks), step)
            if self._unhealthy == self.wish.nonfinite_steps:
                since = step - self._unhealthy + 1
                yield Verdict("divergence", step, self._unhealthy, self.wish.nonfinite_steps - 1, since=since)
                self._unhealthy = 0
            return
        self._unhealthy = 0
        if gated:
            yield Verdict("spike", step, loss, limits.loss, since=step)
        if norm > limits.norm:
            yield Verdict("explosion", step, norm, limits.norm, since=step)
        self._losses.append(min(loss, limits.loss))
        self._norms.append(math.log(max(min(norm, limits.norm), 1e-300)))
        yield from self._divergence(step, loss)

    def _divergence(self, step: int, loss: float) -> Iterable[Verdict]:
        """Whether the loss has left its best level for too long."""
        if len(self._losses) < self.wish.window:
            return
        level = median(self._losses)
        self._first = level if math.isinf(self._first) else self._first
        self._best = min(self._best, level)
        most = max(self._best * self.wish.divergence_factor, self._best + (self._first - self._best) / 4)
        self._above = self._above + 1 if loss > most else 0
        if self._above == self.wish.divergence_steps:
            yield Verdict("divergence", step, loss, most, since=step - self._above + 1)
            self._above = 0

    def _drift(self, rows: Sequence[Row]) -> Iterable[Verdict]:
        """Whether the replicas of every stage hold the same."""
        step = int(rows[0].step)
        if rows[0].parameters == NOT_COMPARED:
            return
        others: list[int] = []
        for first in range(0, len(rows), self._replicas):
            sums = [(row.parameters, row.buffers) for row in rows[first : first + self._replicas]]
            ((most, count),) = Counter(sums).most_common(1)
            right = most if 2 * count > len(sums) or count == len(sums) else None
            others += [first + number for number, found in enumerate(sums) if found != right]
        if others:
            yield Verdict("drift", step, len(others), 0, tuple(others), self._equal + 1)
        else:
            self._equal = step

    def _slow_ranks(self, rows: Sequence[Row]) -> Iterable[Verdict]:
        """Ranks that compute longer than their like; each is told once until it keeps up again."""
        step = int(rows[0].step)
        for rank, row in enumerate(rows):
            first = rank - rank % self._replicas
            usual = median_low([other.compute for other in rows[first : first + self._replicas]])
            most = usual * self.wish.slow_factor
            self._slow[rank] = self._slow[rank] + 1 if row.compute > max(most, usual + self._noise) else 0
            if self._slow[rank] == SLOW_STEPS:
                yield Verdict("slow_rank", step, row.compute, most, (rank,), step - SLOW_STEPS + 1)

    def _input(self, rows: Sequence[Row]) -> Iterable[Verdict]:
        """Whether the run waits for data; told once until it does so no more."""
        self._waits.append((fmean(row.waited for row in rows), fmean(row.wall for row in rows)))
        wall = sum(seconds for _, seconds in self._waits)
        share = sum(waited for waited, _ in self._waits) / wall if wall > 0 else 0.0
        bound = len(self._waits) == INPUT_STEPS and share > self.wish.input_share
        if bound and not self._bound:
            step = int(rows[0].step)
            yield Verdict("input_bound", step, share, self.wish.input_share, since=step - INPUT_STEPS + 1)
        self._bound = bound

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: all that does not depend on the ranks."""
        known = math.isfinite(self._first)
        return {
            "losses": list(self._losses),
            "log_norms": list(self._norms),
            "levels": [self._first, self._best] if known else [],
            "in_a_row": [self._above, self._unhealthy],
            "equal": self._equal,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint keeps; where it keeps nothing, from nothing."""
        self._losses = deque(state.get("losses", []), maxlen=self.wish.window)
        self._norms = deque(state.get("log_norms", []), maxlen=self.wish.window)
        self._first, self._best = state.get("levels") or (math.inf, math.inf)
        self._above, self._unhealthy = state.get("in_a_row", (0, 0))
        self._equal = state.get("equal", 0)
        self._slow.clear()
        self._waits.clear()
        self._bound = False
