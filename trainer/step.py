"""One optimizer step: its micro-batches, the update, the BatchNorm statistics."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from configs.schema import Run
from data_pipeline import augment
from data_pipeline.stream import Batch
from models import drop_path, norm
from models.coatnet import CoAtNet
from trainer.engine import Engine
from trainer.loss import loss_function
from trainer.recompute import run_block


class StepResult(NamedTuple):
    """What a step leaves; nothing here has waited for the device."""

    loss: Tensor  # mean over this rank's samples
    grad_norm: Tensor  # global, before clipping
    healthy: Tensor  # () bool: the gradient is finite, the update was made
    waited: float  # seconds spent waiting for data


def train_step(
    engine: Engine, batches: Iterator[Batch], run: Run, classes: int, learning_rate: float, step: int
) -> StepResult:
    """Fetch this rank's micro-batches of the next global batch, accumulate their gradients, update once.

    Args:
        step: updates made when this one is done.
    """
    model, device = engine.model, engine.member.device
    assert isinstance(model, CoAtNet)
    loss_of, blocks = loss_function(run.optim.loss), run_block(run.parallel.recompute)
    total = torch.zeros((), device=device)
    waited = 0.0
    for _ in range(engine.layout.accumulation):
        asked = time.perf_counter()
        cpu_batch = next(batches)
        waited += time.perf_counter() - asked
        batch = cpu_batch.to(device)
        images = augment.prepare(batch, run.augment, torch.float32, run.precision.channels_last)
        wanted = augment.targets(batch, classes, run.optim.label_smoothing, run.optim.loss)
        drop = None
        if run.model.drop_path > 0:
            drop = drop_path.scales(cpu_batch.seeds_B, model.drop_rates, model.drop_group)
            drop = drop.to(device, non_blocking=True)
        total += engine.forward_backward(images, wanted, loss_of, drop_SB=drop, run=blocks)
    grad_norm = engine.update(learning_rate)
    healthy = torch.isfinite(grad_norm)
    norm.commit(model, healthy=healthy)
    if engine.average is not None:
        engine.average.update(step)
    return StepResult(total / engine.layout.accumulation, grad_norm, healthy, waited)
