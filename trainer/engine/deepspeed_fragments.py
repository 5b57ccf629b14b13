"""What a rank holds of DeepSpeed's master weights and moments, as fragments of parameters.

Beside deepspeed_shims.py the only file that knows where DeepSpeed keeps things.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.engine.moments import moments_of


@dataclass(frozen=True)
class Fragment:
    """A part of one parameter whose fp32 master value and Adam moments this rank holds."""

    name: str  # the parameter's, `blocks.<stage>.<index>.<path>`
    offset: int  # elements before it in the flattened parameter
    value: Tensor  # 1-D fp32 view, writable
    moments: dict[str, Tensor]  # "exp_avg", "exp_avg_sq": 1-D views of the same length, fp32 or bf16


def fragments(engine: Any, stage: int, rank: int, world: int, owned: bool) -> Iterator[Fragment]:
    """What this rank holds of every parameter under ZeRO `stage`.

    Args:
        owned: over all ranks each element once, for saving. Otherwise all that this rank holds, for restoring; it
            differs under ZeRO-0 only, where every rank holds everything.

    DeepSpeed's public getters return copies, and under ZeRO-1/2 only whole parameters, by a collective each.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if stage == 0:
        yield from _whole(engine.optimizer, names, *((rank, world) if owned else (0, 1)))
    elif stage in (1, 2):
        yield from _partitions_of_groups(engine.optimizer, names)
    else:
        yield from _partitions_of_parameters(engine.optimizer, names, rank)


def _whole(optimizer: torch.optim.Optimizer, names: dict[int, str], rank: int, world: int) -> Iterator[Fragment]:
    """ZeRO-0: every rank holds everything; of every parameter slice `rank` of `world` even ones."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = moments_of(optimizer, parameter)
            low = rank * parameter.numel() // world
            high = (rank + 1) * parameter.numel() // world
            if high > low:
                views = {key: value[low:high] for key, value in moments.items()}
                yield Fragment(names[id(parameter)], low, parameter.data.view(-1)[low:high], views)


def _partitions_of_groups(zero: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """ZeRO-1/2: the parameters of a group are laid end to end and that line is cut into one piece per rank."""
    for index, group in enumerate(zero.bit16_groups):
        flat = zero.single_partition_of_fp32_groups[index]
        moments = moments_of(zero.optimizer, flat)
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # lies wholly in other ranks' pieces
                continue
            start, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            views = {key: value[start : start + count] for key, value in moments.items()}
            offset, value = mapping.lp_fragment_address.start, flat.data[start : start + count]
            yield Fragment(names[id(parameter)], offset, value, views)


def _partitions_of_parameters(zero: Any, names: dict[int, str], rank: int) -> Iterator[Fragment]:
    """ZeRO-3: every parameter is cut into equal pieces, one per rank, the last one padded."""
    held = [
        _on_disk(zero, flat) if zero._swappable_optimizer_subgroup(number) else (flat, moments_of(zero.optimizer, flat))
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat)
    ]
    for group in zero.fp16_groups:
        for parameter in group:
            index, start, size = zero.grad_position[zero.get_param_id(parameter)]
            flat, moments = held[index]
            offset = rank * size
            count = min(size, parameter.ds_numel - offset)
            if count > 0:
                views = {key: value[start : start + count] for key, value in moments.items()}
                yield Fragment(names[id(parameter)], offset, flat.data[start : start + count], views)


def _on_disk(zero: Any, flat: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A part of the weights and its moments as views of DeepSpeed's files.

    Its own transfers go past the system's cache, which keeps both in step: what is written here is on the disk before
    they read it, and what they write is forgotten here.
    """
    found = zero.optimizer_swapper.swap_params_info[flat.ds_id]
    value, *moments = (
        torch.from_file(kept.swap_path, shared=True, size=found.numel(), dtype=torch.float32) for kept in found.tensors
    )
    return value, dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
