"""Whether a run fits the memory of its devices, estimated before it starts. No torch where the run names its device."""

from collections.abc import Iterator
from dataclasses import replace

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from models.activations import Device
from trainer.plan import Layout, layout
from trainer.planning import memory
from trainer.planning.anatomy import Anatomy
from trainer.planning.memory import FIXED as FIXED
from trainer.planning.memory import Memory as Memory
from trainer.stages import partition


def kind_of(run: Run) -> Device:
    """The device that a run asks for, or that this machine has."""
    if run.cluster.device != "auto":
        return run.cluster.device
    from trainer import cluster

    return "cuda" if cluster.device_kind(run) == "cuda" else "cpu"


def estimate(run: Run, plan: Layout, classes: int, stage: int | None = None) -> Memory:
    """The memory of a rank of `stage`, or of the stage that needs most."""
    anatomy = Anatomy(run, classes, kind_of(run))
    if stage is None:
        return memory.of_layout(run, plan, anatomy)
    return memory.of_stage(run, plan, anatomy, partition.ends(run, classes, plan.micro_batch), stage)


def require_fit(run: Run, plan: Layout, classes: int, available: int) -> Memory:
    """The estimate of the stage that needs most, refused if it exceeds `available` bytes per rank.

    Raises:
        InputError: what is needed and what there is, and the nearest settings that would fit.
    """
    need = estimate(run, plan, classes)
    if need.total <= available:
        return need
    where = f" of stage {need.stage} of {plan.stages}" if plan.stages > 1 else ""
    hints = [words for words, changed in _changes(run, plan) if _fits(changed, plan.world, classes, available)]
    if not hints:
        hints = [words for words, changed in _together(run, plan) if _fits(changed, plan.world, classes, available)][:1]
    raise InputError(
        f"{run.model.name} at {run.model.resolution} px with parallel.micro_batch = {plan.micro_batch} on {plan.world} "
        f"ranks needs about {need.total / 1e9:.1f} GB a rank{where} ({need}; an estimate), there are "
        f"{available / 1e9:.1f}; nearest: {', or '.join(hints) or 'more ranks, or a smaller model'}"
    )


def require_elsewhere(run: Run, plan: Layout, classes: int, local: int, available: int) -> int:
    """Refuse a run of which more goes to the host's memory than there is.

    Args:
        local: ranks of this machine.
        available: bytes of its memory.

    Returns:
        Bytes that its ranks need on a disk, at most.

    Raises:
        InputError: what is needed and what there is, and the nearest settings that would do.
    """
    every = [estimate(run, plan, classes, stage) for stage in range(plan.stages)]
    need = local * max(memory.host for memory in every)
    if need > available:
        where = "the host's memory" + (" beside the disk" if run.parallel.offload == "nvme" else "")
        nearest = ["more machines"] if run.parallel.offload == "nvme" else ["parallel.offload nvme", "more machines"]
        raise InputError(
            f"parallel.offload = {run.parallel.offload!r}: the {local} ranks of this machine need about "
            f"{need / 1e9:.1f} GB of {where}, there are {available / 1e9:.1f}; nearest valid: {', or '.join(nearest)}"
        )
    return local * max(memory.disk for memory in every)


def _fits(run: Run, world: int, classes: int, available: int) -> bool:
    """Whether a run is allowed, can be laid out on `world` ranks, and fits."""
    try:
        resolve.check(run)
        return estimate(run, layout(run, world), classes).total <= available
    except InputError:
        return False


def _changed(run: Run, **settings: object) -> tuple[str, Run]:
    """A run with other settings of `parallel`, and the words of the command line for them."""
    words = [f"--parallel.{name.replace('_', '-')} {value}" for name, value in settings.items()]
    return " ".join(words), replace(run, parallel=replace(run.parallel, **settings))  # type: ignore[arg-type]


def _changes(run: Run, plan: Layout) -> Iterator[tuple[str, Run]]:
    """Single settings that need less memory, the cheapest of each kind first."""
    parallel, kinds = run.parallel, ("none", "selective", "full")
    for kind in kinds[kinds.index(parallel.recompute) + 1 :]:
        yield _changed(run, recompute=kind)

    def again(zero: int, stages: int) -> dict[str, object]:
        """What a pipeline under ZeRO-2 or 3 needs too."""
        return {"recompute": "full"} if stages > 1 and zero >= 2 and parallel.recompute == "none" else {}

    for zero in range(parallel.zero + 1, 4):
        yield _changed(run, zero=zero, **again(zero, plan.stages))
    for stages in range(plan.stages + 1, plan.world + 1):
        if plan.world % stages == 0:
            yield _changed(run, pipeline=stages, **again(parallel.zero, stages))
    if plan.stages > 1:
        for balance in partition.BALANCES:
            if balance != parallel.balance:
                yield _changed(run, balance=balance)
    for micro in _smaller(plan.micro_batch):
        yield _changed(run, micro_batch=micro)
    if parallel.offload == "none" and kind_of(run) == "cuda":
        yield _changed(run, offload="cpu")


def _together(run: Run, plan: Layout) -> Iterator[tuple[str, Run]]:
    """All that saves memory at once, with the largest micro-batches first."""
    cuda = kind_of(run) == "cuda"
    for more in [{}, {"offload": "cpu"}] if cuda and run.parallel.offload == "none" else [{}]:
        for micro in (plan.micro_batch, *_smaller(plan.micro_batch)):
            yield _changed(run, zero=3, recompute="full", micro_batch=micro, **more)


def _smaller(micro: int) -> Iterator[int]:
    """The powers of two below a micro-batch, from the largest."""
    power = 1 << (micro - 1).bit_length() >> 1
    while power:
        yield power
        power //= 2
