"""`--parallel.layout auto`: the planner's choice as a run's settings; what it would save a pinned run. No torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import InputError
from configs.schema import Run
from trainer.machine import devices
from trainer.planning import answer, data_set
from trainer.planning.data_set import Size
from trainer.planning.machines import Machines

WORTH, WORTH_DAYS = 0.03, 0.01  # of the time: less is within the estimate's error; and less than this is nothing


@dataclass(frozen=True)
class Advice:
    """What the planner says of a run on certain machines.

    Attributes:
        run: with the fastest layout that fits.
        words: that layout, and what speaks for it.
        days: from start to end with it.
        saved: days less than with the run's own layout; None where that fits nowhere.
    """

    run: Run
    words: str
    days: float
    saved: float | None

    def __str__(self) -> str:
        """One line for `coatnet submit` of a pinned layout; empty where nothing would be gained."""
        if self.saved is None or self.saved < max(WORTH_DAYS, WORTH * (self.days + self.saved)):
            return ""
        return f"--parallel.layout auto would take {self.saved:.3g} days less: {self.words}, {self.days:.3g} days"


def open_layout(run: Run) -> Run:
    """The run with what the planner decides left open, so that no number of ranks is refused for it."""
    return replace(run, parallel=replace(run.parallel, pipeline=1, micro_batch=0, shard_group=0))


def advise(run: Run, size: Size, machines: Machines, place: Path | None = None) -> Advice:
    """The fastest layout of a run on machines.

    Args:
        place: the folder with measured rates; None: the user's own.

    Raises:
        InputError: nothing fits, with the smallest number of such devices on which something would.
    """
    planner = answer.planner_of(run, size, machines, answer.rates_of(run, machines, place))
    found = answer.answer(planner, answer.job_of(run, size), most=1)
    best, outlook = found.best[0]
    saved = found.pinned[1].days - outlook.days if found.pinned is not None else None
    chosen = replace(run, parallel=replace(best.parallel, layout="pinned"))
    return Advice(chosen, f"{best.words()} ({outlook.step:.3g} s a step)", outlook.days, saved)


def advise_for(run: Run, ranks: int, per_node: int, gpu: str | None, nic: float = 400.0) -> Advice:
    """The same for machines that need not be here, as `coatnet submit` knows them; what a login node can answer.

    Args:
        gpu: a name of `trainer.machine.devices`, or a file; None: what this machine has.
        nic: Gb/s of network for each device.

    Raises:
        InputError: nobody says which device; or see `advise`.
        DataError: the data's manifest is damaged.
    """
    name = gpu or devices.here()
    if name is None:
        raise InputError(f"parallel.layout = 'auto': which GPU? Name one of {', '.join(devices.DEVICES)}")
    machines = Machines(devices.named(name, per_node), ranks, per_node, nic * 1e9 / 8)
    return advise(run, data_set.size(run), machines)
