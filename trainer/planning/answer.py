"""What a plan says: the best layouts of a run on certain machines, its own layout, why not the others. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from models import cost, spec
from models.operations import Style
from trainer.plan import layout
from trainer.planning import rates as speeds
from trainer.planning.choose import Candidate, Planner
from trainer.planning.data_set import Size
from trainer.planning.machines import Machines
from trainer.planning.outlook import Job, Outlook, outlook
from trainer.planning.rates import Rates

MOST = 512  # machines that are asked about where fewer do not do


@dataclass(frozen=True)
class Answer:
    """About one number of devices.

    Attributes:
        best: the fastest layouts that fit, and what the whole run is with them; never empty.
        pinned: the run's own layout likewise; None where it cannot be laid out so, or does not fit.
        why: what the run's own layout is refused for; empty if it is not.
        others: for each value that a setting can have, the best with it: how much slower, or why it does not fit.
        count: layouts that were looked at.
    """

    machines: Machines
    best: tuple[tuple[Candidate, Outlook], ...]
    pinned: tuple[Candidate, Outlook] | None
    why: str
    others: tuple[tuple[str, str], ...]
    count: int


def planner_of(run: Run, size: Size, machines: Machines, given: Mapping[Style, Rates]) -> Planner:
    """A planner for a run on machines.

    Compiled code is considered where its speed is known as well as that of eager code: measured beside measured, or
    assumed beside assumed; on a processor it must be measured.
    """
    eager, compiled = given["eager"], given["compiled"]
    alike = bool(eager.measured) == bool(compiled.measured)
    considered = alike and (bool(compiled.measured) or not machines.device.on_host)
    return Planner(run, size.classes, machines, given, ("eager", "compiled") if considered else ("eager",))


def rates_of(run: Run, machines: Machines, place: Any = None) -> dict[Style, Rates]:
    """The rates of both styles, measured ones where the user has some."""
    ranks = machines.per_node if machines.device.on_host else 0
    asked = machines.device, run.precision.dtype
    return {
        style: speeds.of(*asked, style, ranks, run.model.attention, machines.nic, place)
        for style in ("eager", "compiled")
    }


def job_of(run: Run, size: Size) -> Job:
    """What the run has to do."""
    counts = cost.count(spec.of(run.model), run.model.resolution, classes=size.classes)
    steps = resolve.total_steps(run, size.samples)
    return Job(counts.multiply_adds, counts.parameters, steps, run.data.global_batch, run.optim.ema > 0)


def answer(planner: Planner, job: Job, most: int = 5) -> Answer:
    """The best `most` layouts and the rest of it.

    Raises:
        InputError: nothing fits, with the smallest number of such devices on which something would.
    """
    found = planner.candidates()
    fitting = sorted((one for one in found if one.time is not None), key=lambda one: one.rank)
    if not fitting:
        raise InputError(_nothing(planner, found))
    best = tuple((one, foretold(planner, job, one)) for one in fitting[:most])
    pinned, why = _pinned(planner)
    own = (pinned, foretold(planner, job, pinned)) if pinned is not None and pinned.time is not None else None
    return Answer(planner.machines, best, own, why, tuple(_others(planner, found, fitting[0])), len(found))


def foretold(planner: Planner, job: Job, one: Candidate) -> Outlook:
    """The whole run with a layout that fits."""
    assert one.time is not None, "of a layout that does not fit nothing is foretold"
    rates = planner.rates["compiled" if one.parallel.compile else "eager"]
    return outlook(job, one.time.total, planner.machines, rates, planner.run.cluster)


def lacks(one: Candidate, machines: Machines) -> str:
    """How much a layout that does not fit needs of how much, and where."""
    need = one.memory
    if need.total <= machines.available:
        return f"needs {one.host / 1e9:.1f} GB of {machines.host_available / 1e9:.1f} GB host memory"
    where = f" at stage {need.stage}" if one.layout.stages > 1 else ""
    return f"needs {need.total / 1e9:.1f} GB of {machines.available / 1e9:.1f}{where}"


def _pinned(planner: Planner) -> tuple[Candidate | None, str]:
    """The run's own layout, or why it is none."""
    run = planner.run
    try:
        plan = layout(run, planner.machines.devices)
    except InputError as error:
        return None, str(error)
    found = planner.evaluate(run.parallel, plan)
    return found, "" if found.time is not None else lacks(found, planner.machines)


def _others(planner: Planner, found: list[Candidate], best: Candidate) -> list[tuple[str, str]]:
    """For each value of each setting but the best layout's own, what the best layout with it is."""
    settings: dict[str, Callable[[Candidate], Any]] = {
        "pipeline": lambda one: one.parallel.pipeline,
        "ZeRO": lambda one: one.parallel.zero,
        "shard group": lambda one: one.parallel.shard_group,
        "recompute": lambda one: one.parallel.recompute,
        "compiled": lambda one: "yes" if one.parallel.compile else "no",
        "offload": lambda one: one.parallel.offload,
        "micro-batch": lambda one: one.layout.micro_batch,
    }
    rows = []
    for name, of in settings.items():
        for value in sorted({of(one) for one in found} - {of(best)}, key=str if name == "recompute" else None):
            having = [one for one in found if of(one) == value]
            fitting = [one for one in having if one.time is not None]
            rows.append((f"{name} {value}", _verdict(planner, having, fitting, best)))
    return rows


def _verdict(planner: Planner, having: list[Candidate], fitting: list[Candidate], best: Candidate) -> str:
    """What speaks against a value."""
    assert best.time is not None
    if not fitting:
        least = min(having, key=lambda one: one.memory.total)
        return f"{lacks(least, planner.machines)} ({least.words()})"
    other = min(fitting, key=lambda one: one.rank)
    assert other.time is not None
    longer = other.time.total / best.time.total
    return f"{longer:.2f}x the time, {other.memory.total / 1e9:.1f} GB ({other.words()})"


def _nothing(planner: Planner, found: list[Candidate]) -> str:
    """That nothing fits, with what would."""
    machines, run = planner.machines, planner.run
    what = f"{run.model.name} at {run.model.resolution} px with data.global_batch = {run.data.global_batch}"
    if not found:
        return f"{what}: {machines.devices} ranks can neither divide it nor form groups of norm.replica_batch = " \
               f"{run.norm.replica_batch}; nearest: {smallest(planner)}"  # fmt: skip
    least = min(found, key=lambda one: one.memory.total)
    lacking = lacks(least, machines)
    return f"{what}: no layout fits {machines}: the one that needs least ({least.words()}) {lacking}; the smallest " \
           f"cluster of such devices that would: {smallest(planner)}"  # fmt: skip


def smallest(planner: Planner) -> str:
    """The smallest number of such devices on which something fits, in words."""
    near = planner.machines.per_node
    counts = [*range(1, near + 1), *(near * nodes for nodes in range(2, MOST + 1))]
    for devices in counts:
        other = planner.on(devices)
        if other.fits():
            return str(other.machines)
    return f"none up to {MOST} machines; a smaller model, or a device with more memory"


def document(given: Answer, job: Job, size: Size, origin: str) -> dict[str, Any]:
    """All of it as JSON."""
    machines = given.machines
    return {
        "machines": {
            **asdict(machines),
            "nodes": machines.nodes,
            "available_bytes": machines.available,
            "available_host_bytes": machines.host_available,
        },
        "rates": origin,
        "data": asdict(size),
        "job": asdict(job),
        "layouts": given.count,
        "best": [_row(*pair) for pair in given.best],
        "pinned": _row(*given.pinned) if given.pinned is not None else None,
        "pinned_refused": given.why,
        "others": dict(given.others),
    }


def _row(one: Candidate, run: Outlook) -> dict[str, Any]:
    """A layout and what the run is with it."""
    assert one.time is not None
    ledger = run.ledger
    return {
        "parallel": asdict(one.parallel),
        "accumulation": one.layout.accumulation,
        "memory": {**asdict(one.memory), "total": one.memory.total, "host_of_a_machine": one.host},
        "step": {**asdict(one.time), "total": one.time.total},
        "images_per_second": run.images_per_second,
        "mfu": mfu(run),
        "days": run.days,
        "failures": run.failures,
        "seconds_between_saves": run.interval,
        "productive": run.ratio,
        "device_hours": ledger.device_seconds / 3600,
        "tpu_v3_core_days_flops": ledger.core_days_flops,
        "tpu_v3_core_days_device": ledger.core_days_device,
        "energy_kwh": ledger.energy_kwh,
        "money": ledger.money,
        "currency": ledger.now.currency,
    }


def mfu(run: Outlook) -> float | None:
    """Model FLOPs over what the devices could do, of the time that trains; None for a device without a peak."""
    return None if run.ledger.mfu is None else run.ledger.mfu / run.ratio
