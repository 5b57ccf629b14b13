"""Whether a run fits the memory of its devices, estimated before it starts."""

from dataclasses import dataclass, replace

from configs.errors import InputError
from configs.schema import Run
from models import cost, spec
from models.activations import Device
from trainer import cluster
from trainer.plan import Layout

FIXED = 1_500_000_000  # bytes of a CUDA context, libraries and communication buffers; an assumption


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, an estimate.

    Attributes:
        states: parameters, gradients, AdamW's moments, averages and buffers, as the ZeRO stage divides them.
        activations: what the backward pass of one micro-batch keeps, and the inside of what it makes again.
    """

    states: int
    activations: int

    @property
    def total(self) -> int:
        """States and activations together with a fixed share for libraries."""
        return self.states + self.activations + FIXED


def estimate(run: Run, plan: Layout, classes: int) -> Memory:
    """The memory of one rank.

    States are counted: fp32 everywhere, since bf16 is autocast over fp32 parameters. Activations are those of
    `models.activations`: every block eager, all branches computed.
    """
    found = spec.of(run.model)
    parameters = cost.count(found, run.model.resolution, classes=classes).parameters
    own, stage = parameters / plan.world, run.parallel.zero
    weights = 4 * (own if stage == 3 else parameters)
    gradients = 4 * (own if stage >= 2 else parameters)
    moments = 8 * (own if stage >= 1 else parameters)
    master = 4 * own if stage in (1, 2) else 0.0  # an fp32 copy of the own piece beside the whole weights
    average = 4 * (own if stage >= 1 else parameters) if run.optim.ema else 0.0
    device: Device = "cuda" if cluster.device_kind(run) == "cuda" else "cpu"
    blocks = cost.activations(
        found,
        run.model.resolution,
        batch=plan.micro_batch,
        dtype=run.precision.dtype,
        recompute=run.parallel.recompute,
        attention=run.model.attention,
        device=device,
        classes=classes,
    )
    return Memory(int(weights + gradients + moments + master + average), cost.peak(blocks))


def require_fit(run: Run, plan: Layout, classes: int, available: int) -> Memory:
    """The estimate, refused if it exceeds `available` bytes per rank.

    Raises:
        InputError: what is needed and what there is, and the nearest micro-batch or layout that would fit.
    """
    need = estimate(run, plan, classes)
    if need.total <= available:
        return need
    raise InputError(
        f"{run.model.name} at {run.model.resolution} px with parallel.micro_batch = {plan.micro_batch} on {plan.world} "
        f"ranks needs about {need.total / 1e9:.1f} GB a rank ({need.states / 1e9:.1f} states, "
        f"{need.activations / 1e9:.1f} activations; an estimate), there are {available / 1e9:.1f}; nearest: "
        f"{', '.join(_hints(run, plan, classes, available)) or 'more ranks, or a smaller model'}"
    )


def _hints(run: Run, plan: Layout, classes: int, available: int) -> list[str]:
    """Settings that need less memory: the cheapest recomputation that fits, ZeRO-3, a micro-batch that fits."""

    def fits(changed: Run, layout: Layout = plan) -> bool:
        return estimate(changed, layout, classes).total <= available

    selective = replace(run, parallel=replace(run.parallel, recompute="selective"))
    hints = []
    if run.parallel.recompute == "none" and fits(selective):
        hints.append("--parallel.recompute selective")
    elif run.parallel.recompute != "full":
        hints.append("--parallel.recompute full")
    if run.parallel.zero < 3 and plan.world > 1:
        hints.append("--parallel.zero 3")
    micro = 1 << (plan.micro_batch - 1).bit_length() >> 1  # the largest power of two below the micro-batch
    while micro and not fits(run, replace(plan, micro_batch=micro)):
        micro //= 2
    if micro:
        hints.append(f"--parallel.micro-batch {micro} or less")
    return hints
