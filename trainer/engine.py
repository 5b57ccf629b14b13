"""DeepSpeed behind a few methods: forward and backward of a micro-batch, one update, the state's fragments."""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Run
from models.attention import forget_biases, kept_biases
from trainer import deepspeed_shims as shims
from trainer.cluster import Member
from trainer.ema import AVERAGE, WeightAverage, running_statistics
from trainer.optim import adamw, parameter_groups
from trainer.plan import Layout


def deepspeed_config(run: Run, layout: Layout, parameters: int) -> dict[str, Any]:
    """DeepSpeed's whole JSON, every default that matters written out (its own clip default, say, is 1.0).

    Args:
        parameters: elements of the model, from which buffer sizes follow.
    """
    bucket = max(1 << 16, min(parameters, 50_000_000))  # elements; DeepSpeed's default of 5e8 is 2 GB of buffer
    bucket -= bucket % 1024  # it asserts an even number
    stage = run.parallel.zero
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage == 3,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "memory_efficient_linear": False,  # its replacement of F.linear would not see autocast's own casts
    }
    return {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": run.optim.clip_norm if stage else 0.0,  # ZeRO-0: `Engine.update` clips, to know the norm
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": run.precision.dtype == "bf16", "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


class Engine:
    """A model in training under ZeRO 0..3.

    Attributes:
        layout: how the global batch is cut.
        config: DeepSpeed's JSON as it was used.
        groups: the optimizer's parameter groups, with the names in each.
        average: the moving average of the weights, None where the run keeps none.
    """

    def __init__(self, model: nn.Module, run: Run, layout: Layout, member: Member) -> None:
        # Collectives that torch renamed; DeepSpeed calls them by their old names once per step and bucket.
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
        import deepspeed

        shims.check_version()
        shims.build_nothing()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.layout, self.member = layout, member
        self.zero, self.clip_norm = run.parallel.zero, run.optim.clip_norm
        self.average: WeightAverage | None = None
        self.groups = parameter_groups(model.named_parameters(), run.optim.weight_decay)
        self.config = deepspeed_config(run, layout, sum(parameter.numel() for parameter in model.parameters()))
        # Every weight is used once in a pass, so a cache of bf16 copies would only hold memory.
        torch.set_autocast_cache_enabled(False)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(self.groups, run.optim, member.device),
            config=self.config,
            dist_init_required=False,
        )
        if run.optim.ema:
            self.average = WeightAverage(run.optim.ema, self.fragments(owned=False), model)

    def forward_backward(self, images: Tensor, targets: Tensor, loss_of: Any, **forward: Any) -> Tensor:
        """One micro-batch: accumulates gradients, communicates them with the last one of a step.

        Args:
            images: (B, 3, H, W) float.
            targets: (B, classes) float32.
            loss_of: loss of (logits, targets), a mean over the micro-batch.
            forward: further arguments of the model's forward.

        Returns:
            The micro-batch's loss, detached, on the device.
        """
        self._engine.train()
        logits = self._engine(images, **forward)
        loss: Tensor = loss_of(logits.float(), targets)
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # DeepSpeed's word for "next micro-batch"; the update is in `update`
        return loss.detach()

    def update(self, learning_rate: float) -> Tensor:
        """Clip by the global norm, apply AdamW at `learning_rate`, clear the gradients.

        Where the norm is not finite the weights and moments stay as they are: ZeRO 1-3 leave the step out by
        themselves, AdamW's kernel does it under ZeRO-0.

        Returns:
            () the gradient's global norm before clipping, on the device.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.zero == 0:
            limit = self.clip_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit)
            self._engine.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self._engine.step()
            return norm
        self._engine.step()
        found = math.inf if self._engine.optimizer.overflow else self._engine.get_global_grad_norm()
        return torch.as_tensor(found, device=self.member.device)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[Any]:
        """The model as a callable (images) -> logits in evaluation mode, without gradients."""
        self._engine.eval()
        with torch.no_grad(), kept_biases(self.model):
            yield self._engine
        self._engine.train()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights and BatchNorm statistics in place of the raw ones. Collective calls."""
        assert self.average is not None, "the run keeps no average"
        with self.average.swapped():
            self._publish()
            yield
        self._publish()

    @property
    def model(self) -> nn.Module:
        """The network itself; under ZeRO-3 its parameters are in pieces."""
        module: nn.Module = self._engine.module
        return module

    def fragments(self, owned: bool) -> list[shims.Fragment]:
        """The fp32 parameters, Adam moments and weight averages of this rank, as writable views.

        Args:
            owned: over all ranks each element once, for saving; otherwise all that this rank holds, for restoring.
        """
        held = shims.fragments(self._engine, self.zero, self.member.rank, self.member.world, owned)
        return [fragment if self.average is None else self.average.beside(fragment) for fragment in held]

    def buffers(self) -> dict[str, Tensor]:
        """BatchNorm's running statistics by name and their averages, as writable tensors; equal on all ranks."""
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
