"""Bytes of a rank at its peak, by what they are for, before anything starts. No torch.

States are counted in fp32, since bf16 is autocast over fp32 parameters. Activations are those of `models.activations`:
every block eager, all branches computed. tests/parallel/test_held_bytes.py holds both against the live tensors of real
ranks, tests/benchmarks/planner.py the whole against their processes.
"""

from dataclasses import dataclass, replace

from configs.schema import Run
from trainer.engine.deepspeed_config import deepspeed_config, in_memory
from trainer.plan import Layout
from trainer.planning.anatomy import Anatomy, Bytes
from trainer.stages import partition
from trainer.stages.schedule import in_flight

FIXED = {
    "cuda": 1_830_000_000,
    "cpu": 860_000_000,
}  # of libraries: on a GPU CUDA's context and kernels' code (H200, torch 2.11); torch and all else

# What a process takes on a CPU beside tensors that are alive: kernels' scratch and code, copies that DeepSpeed and
# AdamW make in a step (all gradients laid end to end, at least), and pieces of the C library's heap that nothing fits
# into. By ZeRO stage: bytes, and a share of the rank's weights whole. Fitted by least squares of the errors' shares to
# CoAtNet-0 and -1 in the record `planner-cpu`, which has other networks too. Two ranks of one run that do the same
# differ by up to a fifth.
HEAP, HEAP_OF_WEIGHTS = (144e6, 188e6, 123e6, 131e6), (1.17, 2.25, 2.52, 1.55)
# On a GPU, of the largest block's activations: gradients of maps on their way, scratch. Assumed; within 10 % for nine
# layouts of CoAtNet-0 to -5 in the record `planner-cuda`.
MAPS = 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a stage at its peak, an estimate.

    Attributes:
        states: parameters, gradients, AdamW's moments and averages, as the ZeRO stage divides them.
        activations: what the backward passes of the micro-batches in flight keep, the inside of what one of them makes
            again, and in a pipeline what is on its way to other stages.
        gathered: of ZeRO-3, whole weights beside the rank's pieces.
        buffers: in which DeepSpeed lays gradients out, and gathers weights.
        workspace: what kernels and the allocator take beside tensors.
        apart: of all these, what is never there together: the gradients of a step of one micro-batch come as its
            activations go.
        moved: of the states those that `parallel.offload` keeps off the device; not in the total.
        host: in the host's memory, where a device has its own: what was moved there, and buffers on the way to a disk.
        disk: in files.
        libraries: what a process has before it builds anything.
        stage: of the pipeline.
    """

    states: int
    activations: int
    gathered: int = 0
    buffers: int = 0
    workspace: int = 0
    apart: int = 0
    moved: int = 0
    host: int = 0
    disk: int = 0
    libraries: int = FIXED["cuda"]
    stage: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        parts = self.states + self.activations + self.gathered + self.buffers + self.workspace
        return parts - self.apart + self.libraries

    def __str__(self) -> str:
        """The parts in GB, for messages."""
        named = {
            "states": self.states, "whole weights": self.gathered, "activations": self.activations,
            "buffers": self.buffers, "workspace": self.workspace,
        }  # fmt: skip
        parts = [
            f"{size / 1e9:.2f} {name}" for name, size in named.items() if size or name in ("states", "activations")
        ]
        together = f", {self.apart / 1e9:.2f} of it never together" if self.apart else ""
        moved = f"; {self.moved / 1e9:.2f} GB of states elsewhere" if self.moved else ""
        return f"{', '.join(parts)}{together}, the rest libraries{moved}"


def of_stage(run: Run, plan: Layout, anatomy: Anatomy, ends: tuple[int, ...], number: int) -> Memory:
    """Of a rank of stage `number`, where the stages end at these blocks."""
    first, last = ends[number - 1] if number else 0, ends[number]
    found = _states(run, plan, anatomy, first, last)
    activations = _activations(run, plan, anatomy, ends, number)
    return replace(
        found,
        activations=activations,
        buffers=_buffers(run, plan, anatomy, first, last, found.gathered),
        workspace=_workspace(run, plan, anatomy, first, last),
        apart=_apart(run, plan, anatomy, first, last),
        libraries=FIXED[anatomy.kind],
        stage=number,
    )


def of_layout(run: Run, plan: Layout, anatomy: Anatomy) -> Memory:
    """Of a rank of the stage that needs most.

    Raises:
        InputError: there are more stages than blocks.
    """
    ends = partition.ends(run, anatomy.classes, plan.micro_batch)
    every = (of_stage(run, plan, anatomy, ends, number) for number in range(plan.stages))
    return max(every, key=lambda memory: memory.total)


def _states(run: Run, plan: Layout, anatomy: Anatomy, first: int, last: int) -> Memory:
    """What does not depend on the micro-batch, of a rank that holds the blocks [first, last)."""
    elements = anatomy.elements(first, last)
    whole, own = 4.0 * elements, 4.0 * elements / plan.replicas
    zero, offload, alone = run.parallel.zero, run.parallel.offload, anatomy.kind == "cuda"
    weights = own if zero == 3 else whole
    gradients = _gradients(run, plan, anatomy, first, last)
    update = (2 if run.precision.moments == "fp32" else 1) * (own if zero else whole)  # AdamW's two moments
    if zero:
        update += own  # AdamW moves an fp32 copy of the own piece, also where the weights are fp32
    if run.optim.ema:
        update += own if zero else whole
    if run.parallel.shard_group:
        weights += 4.0 * elements / run.parallel.shard_group  # the second copy
    here, host, disk = weights + gradients + update, 0.0, 0.0
    if offload == "nvme":
        disk = update + weights
        here = gradients + in_memory(plan, anatomy.weights(first, last))
        here, host = (0.0, here) if alone else (here, 0.0)
    elif offload == "cpu" and alone:  # in the host's memory nothing has moved where that is the device's
        # AdamW finds the gradient of the own piece there; several micro-batches add it up there under ZeRO-2.
        here = {1: weights + gradients, 2: weights, 3: 0.0}[zero]
        host = update + own + (own if zero == 3 or (zero == 2 and plan.accumulation > 1) else 0.0)
    moved = weights + gradients + update - here if alone else disk
    gathered = 0
    if zero == 3 and (plan.replicas > 1 or offload == "nvme" or (alone and offload == "cpu")):
        gathered = 4 * _gathered(run, plan, anatomy, first, last)
    return Memory(int(here), 0, gathered, moved=int(moved), host=int(host), disk=int(disk))


def _gradients(run: Run, plan: Layout, anatomy: Anatomy, first: int, last: int) -> float:
    """Those that a rank adds up. Under ZeRO-2 it keeps whole the ones of all weights that reach into its piece."""
    elements = anatomy.elements(first, last)
    if run.parallel.zero == 2 and run.parallel.offload == "none":
        return 4.0 * anatomy.reaching(first, last, plan.replicas)
    return 4.0 * elements / (plan.replicas if run.parallel.zero >= 2 else 1)


def _buffers(run: Run, plan: Layout, anatomy: Anatomy, first: int, last: int, gathered: int) -> int:
    """DeepSpeed's own (0.19): a bucket for each dtype that travels, in fp32 below ZeRO-3; two where traffic overlaps.

    ZeRO-3 gathers in bf16 what is then laid out in fp32, and sends copies of a bucket.
    """
    zero, narrow = run.parallel.zero, run.precision.dtype == "bf16"
    if zero == 0:
        return 0
    config = deepspeed_config(run, plan, anatomy.weights(first, last))["zero_optimization"]
    bucket: int = config["reduce_bucket_size"]
    if zero < 3:
        overlap: bool = config["overlap_comm"]
        return 4 * bucket * (1 + narrow) * (1 + overlap)
    return bucket * (4 + 2 * narrow) + (gathered // 2 if narrow else 0) + min(bucket, anatomy.elements(first, last)) * 2


def _workspace(run: Run, plan: Layout, anatomy: Anatomy, first: int, last: int) -> int:
    """What is taken beside tensors."""
    if anatomy.kind == "cuda":
        return int(MAPS * anatomy.largest_saved(first, last, plan.micro_batch))
    if run.parallel.offload == "nvme":  # piece by piece, and the heap is given back: `trainer.engine.disk`
        return int(HEAP[run.parallel.zero])
    return int(HEAP[run.parallel.zero] + HEAP_OF_WEIGHTS[run.parallel.zero] * 4.0 * anatomy.elements(first, last))


def _apart(run: Run, plan: Layout, anatomy: Anatomy, first: int, last: int) -> int:
    """What of gradients and activations is never there together in a step of one micro-batch without a pipeline."""
    if plan.accumulation > 1 or plan.stages > 1 or run.parallel.zero == 3 or run.parallel.offload != "none":
        return 0
    share = plan.replicas if run.parallel.zero == 2 else 1
    return anatomy.apart(first, last, partition.inside(run), plan.micro_batch, 4.0 / share)


def _gathered(run: Run, plan: Layout, anatomy: Anatomy, first: int, last: int) -> int:
    """Weights that ZeRO-3 holds whole at the end of a forward pass, at most, in elements.

    It keeps a weight that is needed again before so many elements of others: between its use in a forward pass and in
    the backward pass lie the later weights twice. What it has fetched ahead and the block at work come on top. In fp32
    autograd keeps views of all weights that no block makes again, whatever DeepSpeed has let go; in bf16 it keeps
    autocast's copies instead, which are among the activations.
    """
    if run.precision.dtype == "fp32" and partition.inside(run) == "none":
        return anatomy.elements(first, last)
    config = deepspeed_config(run, plan, anatomy.weights(first, last))["zero_optimization"]
    kept: int = config["stage3_max_reuse_distance"] // 2 + config["stage3_prefetch_bucket_size"]
    return min(anatomy.elements(first, last), kept + anatomy.largest_block(first, last))


def _activations(run: Run, plan: Layout, anatomy: Anatomy, ends: tuple[int, ...], number: int) -> int:
    """Bytes at the beginning of the backward pass that meets the most micro-batches in flight."""
    first, last = ends[number - 1] if number else 0, ends[number]
    kept = anatomy.bytes(first, last, partition.inside(run), plan.micro_batch)
    flying = in_flight(len(ends), number, plan.accumulation)
    # All but one keep their inputs only where the stage is made again.
    again = partition.remakes(run) and number < len(ends) - 1
    held = kept.saved + (flying - 1) * (kept.entering if again else kept.saved)
    # The pictures of a whole step, a byte a channel, as they were loaded into the host's memory, by every stage.
    loaded = plan.accumulation * plan.micro_batch * 3 * run.model.resolution**2 if anatomy.kind == "cpu" else 0
    return held + kept.inside + loaded + _travelling(run, plan, kept)


def _travelling(run: Run, plan: Layout, kept: Bytes) -> int:
    """Bytes of what a stage has put out, and of gradients: `Pipeline.swap` keeps 2 x stages transfers sent.

    A middle stage sends activations and gradients in turn. What a stage put out and still has in flight is among them,
    unless it was made again.
    """
    stages, micros = plan.stages, plan.accumulation
    out, back = kept.to_next, kept.to_previous
    each = stages if out and back else 2 * stages
    outputs = min(each, micros) + partition.remakes(run) + 1 if out else 0  # one is the gradient that was received
    gradients = min(each, micros - 1) if back else 0
    return outputs * out + gradients * back
