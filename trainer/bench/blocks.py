"""Seconds of every block of a run's network in a training step on this machine: `coatnet bench blocks`."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from configs.errors import InputError
from configs.schema import Run
from models import coatnet, drop_path, norm
from models.coatnet import CoAtNet
from trainer import cluster
from trainer.engine import network
from trainer.engine.recompute import run_block

WARMUP = {"cpu": 1, "cuda": 3}  # rounds before the first measured one
REPEATS = {"cpu": 1, "cuda": 10}  # passes of a block measured together: a single one would be the launch of its kernels


def measure(run: Run, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward and a backward pass of each block, one value for each round.

    Each block runs by itself as the run has it: its precision, recomputation, stochastic depth and compilation, on the
    output of the block before it. Neither communication nor the optimizer is measured.

    Args:
        run: of which neither the data nor the layout matters; the head has data.synthetic_classes outputs.
        batch: samples of a pass, which form one BatchNorm group.
        rounds: measured ones.

    Raises:
        InputError: a CUDA device is wanted and there is none, or `batch` parts a model.drop_path_group.
    """
    kind = cluster.device_kind(run)
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("cluster.device = 'cuda': torch finds no CUDA device on this machine; nearest valid: cpu")
    drop_path.check_groups(run.model.drop_path_group if run.model.drop_path else 0, [(0, batch)])
    if kind == "cuda":  # as `cluster.join` sets them for training
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not run.precision.deterministic
        torch.backends.cudnn.benchmark = not run.precision.deterministic
    device = torch.device(kind)
    model = network.bare(run, run.data.synthetic_classes, device).train()
    norm.configure(model, group=batch)
    if run.parallel.compile:
        coatnet.compile_blocks(model)
    passes = _passes(model, run, batch, device)
    for _ in range(WARMUP[kind]):
        for once in passes.values():
            once()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, once in passes.items():
            seconds[name].append(_timed(once, device))
    return seconds


def _passes(model: CoAtNet, run: Run, batch: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """For each block a function that runs it forward and backward once."""
    factors = drop_path.scales(torch.arange(batch), model.drop_rates, model.drop_group).to(device)
    asked = run.parallel
    call = run_block(asked.recompute, asked.recompute_impl, asked.recompute_offload)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, *model.resolution, generator=draw).to(device)
    if run.precision.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found: dict[str, Callable[[], None]] = {}
    first = 0
    for name, block in model.flat:
        last = first + len(block.drop_rates)
        drop = factors[first:last] if run.model.drop_path and last > first else None
        first = last

        def forward(x: Tensor, block: Any = block, drop: Tensor | None = drop) -> Tensor:
            autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            with autocast if run.precision.dtype == "bf16" else nullcontext():
                output: Tensor = block(x, drop) if call is None else call(block, x, drop)
            return output

        with torch.no_grad():
            y = forward(x)
        found[name] = _pass(forward, x, y, wants_gradient=bool(found))
        x = y
    return found


def _pass(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, wants_gradient: bool) -> Callable[[], None]:
    """Forward on `x` and backward from a gradient like `y`; the pictures want none."""
    entering = x.detach().requires_grad_(wants_gradient)
    gradient = torch.ones_like(y)

    def once() -> None:
        entering.grad = None
        torch.autograd.backward(forward(entering), gradient)

    return once


def _timed(once: Callable[[], None], device: torch.device) -> float:
    """Seconds of one pass."""
    repeats = REPEATS[device.type]
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        once()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats
