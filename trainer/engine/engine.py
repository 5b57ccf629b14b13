"""DeepSpeed behind a few methods: forward and backward of a micro-batch, one update, the state's fragments."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Run
from models.attention import forget_biases, kept_biases
from trainer.cluster import Member
from trainer.engine import deepspeed_shims as shims
from trainer.engine import disk
from trainer.engine.deepspeed_config import Weights, deepspeed_config
from trainer.engine.deepspeed_fragments import Fragment, fragments
from trainer.engine.ema import AVERAGE, WeightAverage, running_statistics
from trainer.engine.optim import adamw, clip, parameter_groups
from trainer.engine.recompute import RunBlock, run_block
from trainer.plan import Layout
from trainer.stages.pipeline import Micro, Pipeline


def called(run: Run) -> RunBlock | None:
    """How the network calls its blocks. Where a pipeline makes whole stages again, "full" does no more than that."""
    parallel = run.parallel
    by_stage = parallel.pipeline > 1 and parallel.zero >= 2
    kind = "none" if by_stage and parallel.recompute == "full" else parallel.recompute
    return run_block(kind, parallel.recompute_impl, parallel.recompute_offload)


class Engine:
    """A model in training under ZeRO 0..3.

    Attributes:
        layout: how the global batch is cut.
        config: DeepSpeed's JSON as it was used.
        groups: the optimizer's parameter groups, with the names in each.
        average: the moving average of the weights, None where the run keeps none.
        before_change: is called before anything changes what `fragments` and `buffers` give, or gets it to change it.
    """

    def __init__(self, model: nn.Module, run: Run, layout: Layout, member: Member) -> None:
        shims.begin()
        deepspeed = shims.imported()
        self.layout, self.member = layout, member
        self.zero, self.clip_norm = run.parallel.zero, run.optim.clip_norm
        self.blocks = called(run)
        self.pipeline = Pipeline(member, remakes=self.zero >= 2) if member.stages > 1 else None
        self.average: WeightAverage | None = None
        self.before_change: Callable[[], None] = lambda: None
        self.groups = parameter_groups(model.named_parameters(), run.optim.weight_decay)
        sizes = [shims.elements(parameter) for parameter in model.parameters()]
        self.config = deepspeed_config(run, layout, Weights(sum(sizes), max(sizes)))
        # Every weight is used once in a pass, so a cache of bf16 copies would only hold memory.
        torch.set_autocast_cache_enabled(False)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(self.groups, run.optim, member.device, run.precision.moments),
            config=self.config,
            dist_init_required=False,
            mpu=shims.enter_mesh(member, model),
        )
        if self.zero == 3 and run.parallel.offload != "none":
            shims.keep_gradients(self._engine)
            shims.write_moments(self._engine)
        if run.optim.ema:
            room = disk.keeper(run, member.rank) if run.parallel.offload == "nvme" else torch.clone
            self.average = WeightAverage(run.optim.ema, self.fragments(owned=False), model, room)

    def forward_backward(self, micros: Iterator[Micro], loss_of: Any) -> Tensor:
        """The micro-batches of one optimizer step: accumulates gradients, communicates them with the last.

        Args:
            micros: what this rank's stage needs of each of its replica's micro-batches.
            loss_of: loss of (logits, targets), a mean over the micro-batch.

        Returns:
            () the mean of the micro-batches' losses, on the device; the same on every stage of a replica.
        """
        self._engine.train()
        count = self.layout.accumulation
        if self.pipeline is not None:
            samples = self.layout.micro_batch
            total = self.pipeline.train(self._forward, self._backward, micros, count, samples, loss_of)
            return total / count
        total = torch.zeros((), device=self.member.device)
        for _ in range(count):
            micro = next(micros)
            assert micro.images is not None, "the only stage takes the pictures"
            assert micro.targets is not None, "and the targets"
            loss: Tensor = loss_of(self._forward(micro.images, micro.drop_SB).float(), micro.targets)
            self._backward(loss)
            total += loss.detach()
        return total / count

    def _forward(self, x: Tensor, drop_SB: Tensor | None) -> Tensor:
        """This rank's stage in training mode."""
        output: Tensor = self._engine(x, drop_SB=drop_SB, run=self.blocks)
        return output

    def _backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch from a scalar; DeepSpeed divides it by the number of micro-batches."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # DeepSpeed's word for "next micro-batch"; the update is in `update`

    def update(self, learning_rate: float) -> Tensor:
        """Clip by the global norm, apply AdamW at `learning_rate`, clear the gradients.

        Where the norm is not finite the weights and moments stay as they are: ZeRO 1-3 leave the step out by
        themselves, AdamW's kernel does it under ZeRO-0.

        Returns:
            () the gradient's global norm before clipping, on the device.
        """
        self.before_change()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.zero == 0:
            norm = clip(list(self._engine.module.parameters()), self.clip_norm or math.inf, self.member.pipe_group)
            self._engine.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self._engine.step()
            return norm
        self._engine.step()
        found = math.inf if self._engine.optimizer.overflow else self._engine.get_global_grad_norm()
        return torch.as_tensor(found, device=self.member.device)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[Any]:
        """The model as a callable (images) -> logits in evaluation mode, without gradients.

        With a pipeline all stages call it for the same batches; it returns None on all but the last.
        """
        self._engine.eval()
        with torch.no_grad(), kept_biases(self.model):
            yield self._engine if self.pipeline is None else self._relayed
        if self.pipeline is not None:
            self.pipeline.finish()
        self._engine.train()

    def _relayed(self, images: Tensor) -> Tensor | None:
        """One batch through all stages of the pipeline."""
        assert self.pipeline is not None
        return self.pipeline.relay(self._engine, images)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights and BatchNorm statistics in place of the raw ones. Collective calls."""
        assert self.average is not None, "the run keeps no average"
        self.before_change()
        with self.average.swapped():
            self._publish()
            yield
        self._publish()

    @property
    def model(self) -> nn.Module:
        """The network itself; under ZeRO-3 its parameters are in pieces."""
        module: nn.Module = self._engine.module
        return module

    def fragments(self, owned: bool) -> list[Fragment]:
        """The fp32 parameters, Adam moments and weight averages of this rank, as writable views.

        Args:
            owned: over all ranks each element once, for saving; otherwise all that this rank holds, for restoring.
        """
        self.before_change()
        held = fragments(self._engine, self.zero, self.member.replica, self.member.replicas, owned)
        return [fragment if self.average is None else self.average.beside(fragment) for fragment in held]

    def buffers(self) -> dict[str, Tensor]:
        """BatchNorm's running statistics by name and their averages, as writable tensors; equal on all ranks."""
        self.before_change()
        averages = self.average.buffers if self.average is not None else {}
        return running_statistics(self.model) | {AVERAGE + name: value for name, value in averages.items()}

    @property
    def updates(self) -> int:
        """Updates that AdamW has made: the steps taken, less those left out for a gradient that was not finite."""
        return shims.optimizer_step(self._engine)

    def restored(self, updates: int) -> None:
        """Let parameters and optimizer follow fragments that were just overwritten. A collective call."""
        shims.set_optimizer_step(self._engine, updates)
        self._publish()

    def _publish(self) -> None:
        """Let the parameters follow fragments that were written to. A collective call."""
        shims.publish(self._engine, self.zero)
        forget_biases(self.model)

    def write_config(self, folder: Path) -> None:
        """Save DeepSpeed's JSON beside the run's own."""
        (folder / "deepspeed.json").write_text(json.dumps(self.config, indent=2) + "\n")
