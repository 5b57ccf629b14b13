"""Whether a run fits the memory of its devices, estimated before it starts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import InputError
from configs.schema import Run
from models import coatnet, norm, spec
from trainer import network
from trainer.plan import Layout

FIXED = 1_500_000_000  # bytes of a CUDA context, libraries and communication buffers; an assumption


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, an estimate.

    Attributes:
        states: parameters, gradients, AdamW's moments, averages and buffers, as the ZeRO stage divides them.
        activations: what the backward pass of one micro-batch keeps.
    """

    states: int
    activations: int

    @property
    def total(self) -> int:
        """States and activations together with a fixed share for libraries."""
        return self.states + self.activations + FIXED


def estimate(run: Run, plan: Layout, classes: int) -> Memory:
    """The memory of one rank.

    States are counted: fp32 everywhere, since bf16 is autocast over fp32 parameters. Activations are those that a
    forward pass of the real network on the meta device saves for its backward pass; bf16 halves them.
    """
    model = coatnet.build(
        spec.get(run.model.name), resolution=run.model.resolution, classes=classes, stride=network.stride(run),
        attention="explicit",
    )  # fmt: skip
    parameters, world, stage = sum(parameter.numel() for parameter in model.parameters()), plan.world, run.parallel.zero
    shards = {0: 0, 1: 1, 2: 2, 3: 3}[stage]
    own = parameters / world
    weights = 4 * (own if shards == 3 else parameters)
    gradients = 4 * (own if shards >= 2 else parameters)
    moments = 8 * (own if shards >= 1 else parameters)
    master = 4 * own if shards in (1, 2) else 0.0  # an fp32 copy of the own piece beside the whole weights
    average = 4 * (own if shards >= 1 else parameters) if run.optim.ema else 0.0
    saved = saved_bytes(model, plan.micro_batch, run.parallel.recompute == "full")
    if run.precision.dtype == "bf16":
        saved //= 2
    return Memory(int(weights + gradients + moments + master + average), saved)


def saved_bytes(model: coatnet.CoAtNet, batch: int, recompute: bool) -> int:
    """Bytes that one forward pass of `batch` pictures keeps for the backward pass, in fp32.

    With recomputation: the inputs of all blocks and the inside of the largest one.
    """
    norm.configure(model, group=batch)
    model.train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    everything: dict[int, Tensor] = {}  # by storage: neighbours share what one puts out and the other takes in
    blocks: list[tuple[int, int]] = []  # (input, saved inside) of each block

    def run_block(block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
        inside: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in weights:
                inside[storage] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output: Tensor = block(x, drop)
        everything.update(inside)
        blocks.append((x.numel() * x.element_size(), size_of(inside)))
        return output

    model(torch.empty(batch, 3, *model.resolution, device="meta"), None, run_block)
    if recompute:
        return sum(size for size, _ in blocks) + max(inside for _, inside in blocks)
    return size_of(everything)


def size_of(storages: dict[int, Tensor]) -> int:
    """Bytes of the storages behind some tensors."""
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def require_fit(run: Run, plan: Layout, classes: int, available: int) -> Memory:
    """The estimate, refused if it exceeds `available` bytes per rank.

    Raises:
        InputError: what is needed and what there is, and the nearest micro-batch or layout that would fit.
    """
    need = estimate(run, plan, classes)
    if need.total <= available:
        return need
    hints = []
    if run.parallel.recompute == "none":
        hints.append("--parallel.recompute full")
    if run.parallel.zero < 3 and plan.world > 1:
        hints.append("--parallel.zero 3")
    per_image = need.activations / plan.micro_batch
    room = int((available - need.states - FIXED) / per_image)
    if 0 < room < plan.micro_batch:
        hints.append(f"--parallel.micro-batch {2 ** (room.bit_length() - 1)} or less")
    raise InputError(
        f"{run.model.name} at {run.model.resolution} px with parallel.micro_batch = {plan.micro_batch} on {plan.world} "
        f"ranks needs about {need.total / 1e9:.1f} GB a rank ({need.states / 1e9:.1f} states, "
        f"{need.activations / 1e9:.1f} activations; an estimate), there are {available / 1e9:.1f}; nearest: "
        f"{', '.join(hints) or 'more ranks, or a smaller model'}"
    )
