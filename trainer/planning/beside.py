"""The planner's figures of a run that is here, to be put beside what is measured. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.schema import Run
from models.operations import Style
from trainer.machine import devices
from trainer.plan import Layout
from trainer.planning import answer, table
from trainer.planning.choose import Planner
from trainer.planning.machines import Machines
from trainer.planning.rates import Rates
from trainer.planning.roofline import of_block
from trainer.planning.step_time import StepTime
from trainer.stages import partition

NIC = 50e9  # bytes/s of network for each device, where nobody says


@dataclass(frozen=True)
class Expected:
    """Of the blocks of one stage.

    Attributes:
        seconds: of one micro-batch, forward and backward, by block. What a block makes again is in its backward pass;
            where the stage is made again as a whole, the forward pass is there twice. Empty for an unknown device.
        origin: of the rates behind them.
    """

    seconds: dict[str, tuple[float, float]]
    origin: str


def machines_of(device_name: str, world: int, per_node: int) -> Machines | None:
    """The machines of a run that is here; None for a GPU that the table does not have."""
    device = devices.processor(per_node) if device_name == "cpu" else devices.of_driver(device_name)
    if device is None:
        return None
    return Machines(device if device.on_host else devices.of_this_machine(device), world, per_node, NIC)


def planner(run: Run, classes: int, machines: Machines) -> Planner:
    """The planner of a run that is here."""
    return Planner(run, classes, machines, answer.rates_of(run, machines))


def seconds(run: Run, classes: int, plan: Layout, machines: Machines) -> StepTime:
    """What a step of the layout as it is takes."""
    return planner(run, classes, machines).seconds(run.parallel, plan)


def origin(run: Run, machines: Machines) -> str:
    """Where the rates behind that come from."""
    return answer.rates_of(run, machines)["compiled" if run.parallel.compile else "eager"].origin


def blocks(run: Run, classes: int, plan: Layout, stage: int, machines: Machines | None) -> Expected:
    """What the roofline says of the blocks of a stage."""
    if machines is None:
        return Expected({}, "this device is not in the planner's table")
    style: Style = "compiled" if run.parallel.compile else "eager"
    return _blocks(planner(run, classes, machines), run, plan, stage, style)


def blocks_at(run: Run, plan: Layout, machines: Machines, rates: Rates) -> Expected:
    """The same at certain rates, of a run on made-up pictures without a pipeline."""
    made = Planner(run, run.data.synthetic_classes, machines, {rates.style: rates})
    return _blocks(made, run, plan, 0, rates.style)


def _blocks(made: Planner, run: Run, plan: Layout, stage: int, style: Style) -> Expected:
    rates, classes = made.rates[style], made.anatomy.classes
    ends = partition.ends(run, classes, plan.micro_batch)
    first = ends[stage - 1] if stage else 0
    again = partition.remakes(run) and stage < plan.stages - 1
    found = {}
    for block in made.pace.operations(style)[first : ends[stage]]:
        seconds = of_block(block, rates, plan.micro_batch)
        backward = seconds.backward + seconds.again(partition.inside(run))
        found[block.name] = (seconds.forward * (1 + again), backward)
    return Expected(found, rates.origin)


def block_table(measured: Mapping[str, Sequence[float]], expected: Expected) -> str:
    """Every block's milliseconds, measured and by the roofline, and the ratio."""
    rows = [("block", "forward ms", "roofline", "ratio", "backward ms", "roofline", "ratio", "share")]
    whole = sum(sum(pair) for pair in measured.values())
    for name, pair in measured.items():
        cells = [name]
        for value, roof in zip(pair, expected.seconds.get(name, (None, None)), strict=True):
            cells.append(f"{value * 1e3:.3f}")
            cells += [f"{roof * 1e3:.3f}", f"{value / roof:.2f}"] if roof else ["-", "-"]
        rows.append((*cells, f"{sum(pair) / whole:.1%}"))  # type: ignore[arg-type]
    total = [sum(pair[way] for pair in measured.values()) for way in (0, 1)]
    roofs = [sum(pair[way] for pair in expected.seconds.values()) for way in (0, 1)]
    cells = ["all"]
    for value, roof in zip(total, roofs, strict=True):
        cells += [f"{value * 1e3:.3f}", *([f"{roof * 1e3:.3f}", f"{value / roof:.2f}"] if roof else ["-", "-"])]
    rows.append((*cells, "100.0%"))  # type: ignore[arg-type]
    return f"{table.columns(rows, (0,))}\n\nroofline: {expected.origin}; of one micro-batch"
