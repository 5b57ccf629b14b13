"""Every touch of DeepSpeed's internals, each with its reason and the versions it was run on.

Run on deepspeed 0.19.8. `check_version` refuses a release line these were not written for.
"""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import InputError

TESTED = "0.19"


@dataclass(frozen=True)
class Fragment:
    """A part of one parameter whose fp32 master value and Adam moments this rank holds."""

    name: str  # the parameter's, `blocks.<stage>.<index>.<path>`
    offset: int  # elements before it in the flattened parameter
    value: Tensor  # 1-D fp32 view, writable
    moments: dict[str, Tensor]  # "exp_avg", "exp_avg_sq": 1-D fp32 views of the same length


def check_version() -> None:
    """Refuse a DeepSpeed release whose internals nobody looked at.

    Raises:
        InputError: naming the version found and the line that works.
    """
    installed = importlib.metadata.version("deepspeed")
    if not installed.startswith(f"{TESTED}."):
        raise InputError(
            f"deepspeed {installed} is installed; this trainer is proven on {TESTED}.x: "
            f"pip install 'deepspeed=={TESTED}.*'"
        )


def build_nothing() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives (75 s of C++) at the first start on a CPU.

    `deepspeed.comm` builds the op unless `deepspeed.ops.__compatible_ops__` marks it as unavailable; the table is
    filled lazily by running compilers, so an empty one set first also saves that. Nothing else reads it. gloo does
    the collectives instead.
    """
    import deepspeed.ops

    deepspeed.ops.__dict__["__compatible_ops__"] = {}


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


def publish(engine: Any, stage: int) -> None:
    """Make the ranks' parameters follow their fp32 master fragments, after these were written from outside.

    A collective call. It does what DeepSpeed's own step does behind the optimizer's update.
    """
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()  # an evaluation leaves parameters whole, with their old values
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def set_optimizer_step(engine: Any, step: int) -> None:
    """Tell AdamW how many updates it has made: the moments' bias correction depends on it."""
    for state in _adamw(engine).state.values():
        state["step"].fill_(step)


def optimizer_step(engine: Any) -> int:
    """How many updates AdamW has made. Waits for the device."""
    state = _adamw(engine).state
    return int(next(iter(state.values()))["step"]) if state else 0


def _adamw(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper, or the one it uses as it is under ZeRO-0."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one tensor, made as its first step would make it if it is not there yet."""
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        # A fused AdamW keeps its counter beside the parameters.
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)
    return {key: state[key].view(-1) for key in ("exp_avg", "exp_avg_sq")}


def _whole(optimizer: torch.optim.Optimizer, names: dict[int, str], rank: int, world: int) -> Iterator[Fragment]:
    """ZeRO-0: every rank holds everything; of every parameter slice `rank` of `world` even ones."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = _moments(optimizer, parameter)
            low = rank * parameter.numel() // world
            high = (rank + 1) * parameter.numel() // world
            if high > low:
                views = {key: value[low:high] for key, value in moments.items()}
                yield Fragment(names[id(parameter)], low, parameter.data.view(-1)[low:high], views)


def _partitions_of_groups(zero: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """ZeRO-1/2: the parameters of a group are laid end to end and that line is cut into one piece per rank."""
    for index, group in enumerate(zero.bit16_groups):
        flat = zero.single_partition_of_fp32_groups[index]
        moments = _moments(zero.optimizer, flat)
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # lies wholly in other ranks' pieces
                continue
            start, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            views = {key: value[start : start + count] for key, value in moments.items()}
            yield Fragment(
                names[id(parameter)], mapping.lp_fragment_address.start, flat.data[start : start + count], views
            )


def _partitions_of_parameters(zero: Any, names: dict[int, str], rank: int) -> Iterator[Fragment]:
    """ZeRO-3: every parameter is cut into equal pieces, one per rank, the last one padded."""
    for group in zero.fp16_groups:
        for parameter in group:
            index, start, size = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[index]
            moments = _moments(zero.optimizer, flat)
            offset = rank * size
            count = min(size, parameter.ds_numel - offset)
            if count > 0:
                views = {key: value[start : start + count] for key, value in moments.items()}
                yield Fragment(names[id(parameter)], offset, flat.data[start : start + count], views)
