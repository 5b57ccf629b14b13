"""One optimizer step: its micro-batches, the update, the BatchNorm statistics."""

import math
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
from trainer.engine.engine import Engine
from trainer.engine.gate import Gate
from trainer.engine.loss import loss_function
from trainer.stages.pipeline import Micro


class StepResult(NamedTuple):
    """What a step leaves; nothing here has waited for the device."""

    loss: Tensor  # mean over this replica's samples
    grad_norm: Tensor  # global, before clipping
    healthy: Tensor  # () bool: loss and gradient are finite and within their limits, the update was made
    waited: float  # seconds spent waiting for data
    computed: float  # seconds this thread had a core, but for the data
    batches: list[Batch]  # what it trained on, as it was loaded


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    run: Run,
    classes: int,
    learning_rate: float,
    step: int,
    limit: float = math.inf,
) -> StepResult:
    """Fetch this rank's micro-batches of the next global batch, accumulate their gradients, update once.

    Args:
        step: updates made when this one is done.
        limit: of the loss, a mean over all replicas, above which the update is left out.
    """
    began = time.thread_time()
    source = Micros(engine, batches, run, classes)
    gate = Gate(loss_function(run.optim.loss), engine.layout.accumulation, limit, engine.member.data_group)
    loss = engine.forward_backward(source, gate)
    grad_norm = engine.update(learning_rate)
    healthy = torch.isfinite(grad_norm)
    norm.commit(engine.model, engine.member.data_group, healthy)
    if engine.average is not None:
        engine.average.update(step)
    computed = time.thread_time() - began - source.loading
    return StepResult(loss, grad_norm, healthy, source.waited, computed, source.taken)


class Micros(Iterator[Micro]):
    """Micro-batches on the device, each with what this rank's stage needs of it.

    Attributes:
        waited: seconds spent waiting for data.
        loading: seconds of them in which this thread had a core.
        taken: the batches handed out, as they were loaded.
    """

    def __init__(self, engine: Engine, batches: Iterator[Batch], run: Run, classes: int) -> None:
        assert isinstance(engine.model, CoAtNet)
        self._model, self._member = engine.model, engine.member
        self._batches, self._run, self._classes = batches, run, classes
        self.waited = self.loading = 0.0
        self.taken: list[Batch] = []

    def __next__(self) -> Micro:
        """The next micro-batch; waits for the loader, not for the device."""
        asked, busy = time.perf_counter(), time.thread_time()
        cpu_batch = next(self._batches)
        self.waited += time.perf_counter() - asked
        self.loading += time.thread_time() - busy
        self.taken.append(cpu_batch)
        run, device = self._run, self._member.device
        batch = cpu_batch.to(device)
        images = wanted = drop = None
        if self._member.begins:
            images = augment.prepare(batch, run.augment, torch.float32, run.precision.channels_last)
        if self._member.ends:
            wanted = augment.targets(batch, self._classes, run.optim.label_smoothing, run.optim.loss)
        if run.model.drop_path > 0:
            drop = drop_path.scales(cpu_batch.seeds_B, self._model.drop_rates, self._model.drop_group)
            drop = drop.to(device, non_blocking=True)
        return Micro(images, wanted, drop)
