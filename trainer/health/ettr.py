"""The effective training time ratio (ETTR) of a run: measured from its own files, and foretold for other failure rates.

Measured: productive time over wall time, the definition of Kokolis et al., "Revisiting Reliability in Large-Scale
Machine Learning Research Clusters" (arXiv 2410.21680), who found a mean time to failure of 7.9 h for jobs of 1,024
GPUs. Foretold, to first order like theirs, with the terms of this trainer: of the M seconds from one failure to the
next, D go until it is noticed and R until the next step; the steps since the last save that counts are made again,
which is half a period on average and the W seconds that the save was still being written; and of what remains, every
T seconds of steps cost C seconds of standing still and of slower steps (`trainer.state.interval.cost`):

    ETTR = T / (T + C) * (M - D - R - (T + C) / 2 - W) / M

with T as `trainer/state/interval.py` chooses it for M: Young's sqrt(2 C M), and not below twice what a save takes to
be written.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from trainer.health import goodput
from trainer.health.goodput import NS
from trainer.state.interval import between, cost
from trainer.tracking.track import events

HOURS = (7.9, 1.0)  # between failures: 1,024 GPUs in the paper, and a bad day


@dataclass(frozen=True)
class Costs:
    """What failures and saves cost, in seconds.

    Attributes:
        detection: from a fault to the end of the processes it hit.
        restart: from the start of the command to the first step, with compilation.
        stall: training stands still for a save.
        write: from then on until the save counts.
    """

    detection: float
    restart: float
    stall: float
    write: float


@dataclass(frozen=True)
class Measured:
    """What a run's files say.

    Attributes:
        ratio: productive time over wall time.
        attempts: starts of the run.
        costs: detection is the time between two attempts, since the files tell of nothing in it.
    """

    ratio: float
    wall: float
    attempts: int
    costs: Costs


def measure(folder: Path) -> Measured | None:
    """The ratio and the costs of the run in `folder`; None where nothing was written down yet."""
    last = goodput.last_line(folder / "events" / goodput.FILE)
    if last is None:
        return None
    book = goodput.Book.of(last)
    saves = [event for event in events(folder) if event.get("event") == "save"]
    costs = Costs(
        detection=book.spent["down"] / NS / max(1, book.attempts - 1),
        restart=(book.spent["restart"] + book.spent["compile"]) / NS / max(1, book.attempts),
        stall=median([float(event["stall"]) for event in saves] or [0.0]),
        write=median([float(event["write"]) for event in saves] or [0.0]),
    )
    return Measured(book.goodput, book.wall, book.attempts, costs)


def average(costs: list[Costs]) -> Costs:
    """The means, which is what counts where each failure is as likely as the others."""
    return Costs(*(mean(getattr(one, name) for one in costs) for name in Costs.__dataclass_fields__))


def foretell(costs: Costs, mtbf: float, period: float = 0.0) -> float:
    """The expected ratio at a failure every `mtbf` seconds; see above.

    Args:
        period: seconds of steps between two saves, T; 0: chosen.
    """
    period = period or between(costs.stall, costs.write, mtbf)
    each = cost(costs.stall, costs.write)
    left = mtbf - costs.detection - costs.restart - (period + each) / 2 - costs.write
    return max(0.0, left / mtbf) * (period / (period + each) if period else 1.0)
