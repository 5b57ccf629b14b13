"""DeepSpeed's whole JSON for a run, every default that matters written out. No torch.

Sizes in it are elements. They follow from the weights of the stage and from how many replicas share them.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import Run
from models import cost, spec
from trainer.plan import Layout

PIECE = 8 << 20  # elements of AdamW's state that are taken from the disk together, or the largest weight's
# Weights whose pieces are in memory at once when they come from the disk: a layer's own, of which each has one that is
# large enough to go there, while it works forward and backward, those that wait for autograd, and one to spare.
BUFFERS = 6
LEAST = 1 << 20  # bytes from which on DeepSpeed takes a tensor to the disk
ALIGNED = 4096  # bytes that a disk may want addresses to be a multiple of
THREADS = 4  # of each transfer; DeepSpeed aligns by 1024 bytes for each


class Weights(NamedTuple):
    """How large the weights of a stage are, in elements."""

    parameters: int
    largest: int


def weights(run: Run, classes: int, first: int, last: int) -> Weights:
    """The weights of the blocks [first, last) of the run's network."""
    blocks = cost.count(spec.of(run.model), run.model.resolution, classes=classes).blocks[first:last]
    return Weights(sum(block.parameters for block in blocks), max(block.largest for block in blocks))


def deepspeed_config(run: Run, layout: Layout, sizes: Weights) -> dict[str, Any]:
    """The JSON of one stage. DeepSpeed's own clip default, say, is 1.0."""
    stage = run.parallel.zero
    return {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": run.optim.clip_norm if stage else 0.0,  # ZeRO-0: `Engine.update` clips, to know the norm
        "zero_optimization": _zero(run, layout, sizes),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is vectorised on a CPU too, and needs no compiler
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": run.precision.dtype == "bf16", "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        **_disk(run),
    }


def _zero(run: Run, layout: Layout, sizes: Weights) -> dict[str, Any]:
    """The section on ZeRO."""
    stage, disk = run.parallel.zero, run.parallel.offload == "nvme"
    # An eighth of the stage, so that the gradients of most of it travel while the backward pass goes on, and that the
    # buffers (up to four, in fp32) stay small beside the weights. DeepSpeed's default of 5e8 would be 2 GB each.
    bucket = max(1 << 16, min(max(sizes.parameters // 8, sizes.largest), 50_000_000))
    bucket -= bucket % 1024  # it asserts an even number
    return {
        "stage": stage,
        "contiguous_gradients": True,
        # While gradients travel the backward pass goes on. Under ZeRO-1/2 a pipeline's transfers would overtake them.
        "overlap_comm": stage == 3 or (stage > 0 and layout.stages == 1),
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
        "sub_group_size": piece(layout, sizes) if disk else 1_000_000_000,
        # From the disk a weight comes when it is wanted and goes after it: what was fetched ahead would fill the
        # buffers, in the order of a training step, when an evaluation wants another.
        "stage3_prefetch_bucket_size": 0 if disk else bucket,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 0 if disk else 1_000_000_000,
        "zero_hpz_partition_size": run.parallel.shard_group or 1,
        "memory_efficient_linear": False,  # its replacement of F.linear would not see autocast's own casts
        **_offload(run, layout, sizes),
    }


def piece(layout: Layout, sizes: Weights) -> int:
    """Elements from which on a part of AdamW's state that goes to the disk is large enough; one more weight may be in.

    At least the largest weight's share of a rank.
    """
    return max(PIECE, -(-sizes.largest // layout.replicas))


def _offload(run: Run, layout: Layout, sizes: Weights) -> dict[str, Any]:
    """Where the state lies."""
    kind, stage = run.parallel.offload, run.parallel.zero
    if kind == "none":
        return {}
    place: dict[str, Any] = {"device": kind, "pin_memory": True}
    if kind == "cpu":
        return {"offload_optimizer": place} | ({"offload_param": place} if stage == 3 else {})
    place["nvme_path"] = str(folder(run))
    share = -(-sizes.largest // layout.replicas)
    return {
        # Three: a part's weights and both moments. Its gradient stays where it was added up.
        "offload_optimizer": {**place, "buffer_count": 3, "pipeline_read": False, "pipeline_write": False},
        "offload_param": {**place, "buffer_count": BUFFERS, "buffer_size": share, "max_in_cpu": 0},
    }


def _disk(run: Run) -> dict[str, Any]:
    """How the disk is used."""
    if run.parallel.offload != "nvme":
        return {}
    settings = {"block_size": 1 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True}
    return {"aio": {**settings, "intra_op_parallelism": THREADS, "use_gds": False}}


def folder(run: Run) -> Path:
    """The run's own folder for its state on a disk; another run that is given the same path has another one."""
    name = hashlib.sha256(str(Path(run.folder).absolute()).encode()).hexdigest()[:12]
    return Path(run.parallel.offload_path) / f"coatnet-{name}"


def in_memory(layout: Layout, sizes: Weights) -> int:
    """Bytes of this rank's buffers between the disk and the network."""
    share = -(-sizes.largest // layout.replicas)
    return 4 * (BUFFERS * share + 4 * (piece(layout, sizes) + share))
