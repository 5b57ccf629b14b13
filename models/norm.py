"""BatchNorm whose statistics span a fixed number of samples and move once per optimizer step (DESIGN.md decision 5).

B: samples of this rank's pass, C: channels, H, W: height and width, K: ranks that share a group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


@contextmanager
def recomputing() -> Iterator[None]:
    """Mark a forward pass that repeats an earlier one: equal outputs, but no statistics are gathered again."""
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


class BatchNorm(nn.Module):
    """Normalise each channel of (B, C, H, W) over groups of samples, then scale and shift.

    Statistics are float32 whatever the activation (float64 in a float64 model). A training pass normalises each
    group by its own mean and variance and sets both aside; `commit` moves the running statistics. Evaluation uses
    the running statistics. The output has the input's dtype and memory format. With one group, and one pass per
    commit, this is torch.nn.BatchNorm2d.

    Attributes:
        group: consecutive samples of one pass that share statistics; None: all of them.
        process_group: ranks whose passes form one group together; None: groups stay on this rank.
        pending: (2 C + 1,) sums over groups of mean and unbiased variance since the last commit, and how many groups
            these are. A tensor that is added to in place, so that a compiled block need not be compiled again.
    """

    running_mean: Tensor
    running_var: Tensor
    pending: Tensor

    def __init__(self, channels: int, eps: float = 1e-3, momentum: float = 0.01) -> None:
        """Create the layer.

        Args:
            channels: C.
            eps: added to the variance; 1e-3 as in COATNET.md section 2.
            momentum: share of the new statistics, PyTorch's sense.
        """
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.group: int | None = None
        self.process_group: dist.ProcessGroup | None = None
        self.register_buffer("pending", torch.zeros(2 * channels + 1), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same.

        Raises:
            ValueError: in training, B is not made of whole groups.
        """
        # Parameters may be stored in bf16; the kernels want them in the precision of the statistics.
        weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        if not self.training:
            return F.batch_norm(x_BCHW, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        batch = x_BCHW.shape[0]
        size = self.group or batch
        if batch % size or (self.process_group is not None and batch != size):
            raise ValueError(f"BatchNorm: a pass of {batch} samples is not made of whole groups of {size}")
        if self.process_group is not None:
            normalised, statistics = _normalise_across(x_BCHW, weight, bias, self.eps, self.process_group)
        else:
            normalised, statistics = _normalise_here(x_BCHW, weight, bias, self.eps, size)
        if not _RECOMPUTING.get():
            with torch.no_grad():
                self.pending[:-1].add_(statistics.sum(0).flatten())
                self.pending[-1].add_(statistics.shape[0])
        return normalised

    def extra_repr(self) -> str:
        """What `print(model)` adds."""
        return f"{self.weight.shape[0]}, eps={self.eps}, momentum={self.momentum}, group={self.group}"


def configure(model: nn.Module, *, group: int, process_group: dist.ProcessGroup | None = None) -> None:
    """Say over which samples every BatchNorm of `model` takes its statistics.

    Args:
        model: any module that holds BatchNorm layers.
        group: samples of a group that lie in one local pass. Without `process_group` the local batch is a multiple
            of it and consecutive samples form a group. With one it is the local batch.
        process_group: ranks whose local batches form one group together.
    """
    alone = process_group is None or dist.get_world_size(process_group) == 1
    for layer in _layers(model):
        layer.group = group
        layer.process_group = None if alone else process_group


def commit(model: nn.Module, process_group: dist.ProcessGroup | None = None, healthy: Tensor | None = None) -> None:
    """Move the running statistics by the mean over all groups since the last commit, and forget those groups.

    running = (1 - momentum) * running + momentum * mean over groups, once per optimizer step, so that neither
    accumulation nor recomputation changes it. One all_reduce serves all layers and leaves equal buffers on all ranks.

    Args:
        model: as in `configure`.
        process_group: ranks to average over; None: all ranks where torch.distributed is initialised, else none.
        healthy: () bool on the device; where it is false the groups are forgotten and nothing moves.

    Raises:
        RuntimeError: a layer has seen no training pass since the last commit, or fewer than another has.
    """
    layers = _layers(model)
    if not layers:
        return
    counts = torch.stack([layer.pending[-1] for layer in layers])
    # An assertion of ours, and one that need not wait for the device.
    torch._assert_async(
        ((counts == counts[0]) & (counts > 0)).all(), "BatchNorm: commit needs equally many groups in every layer"
    )
    flat = torch.cat([*(layer.pending[:-1] for layer in layers), counts[:1]])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat, group=process_group)
    means = flat[:-1] / flat[-1]
    with torch.no_grad():
        for layer, part in zip(layers, torch.split(means, [len(layer.pending) - 1 for layer in layers]), strict=True):
            for running, new in zip((layer.running_mean, layer.running_var), part.view(2, -1), strict=True):
                moved = torch.lerp(running, new, layer.momentum)
                running.copy_(moved if healthy is None else torch.where(healthy, moved, running))
            layer.pending.zero_()


def _layers(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of `model`, in order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def _normalise_here(x_BCHW: Tensor, weight: Tensor, bias: Tensor, eps: float, size: int) -> tuple[Tensor, Tensor]:
    """Normalise consecutive groups of `size` samples with the native kernel.

    Returns:
        The output, and (groups, 2, C) of mean and unbiased variance, read out through running buffers of momentum 1.
    """
    # One group is not split: the backward pass of a split would copy the whole gradient.
    parts = torch.split(x_BCHW, size) if size < len(x_BCHW) else (x_BCHW,)
    statistics = torch.zeros(len(parts), 2, x_BCHW.shape[1], dtype=weight.dtype, device=x_BCHW.device)
    outputs = [
        F.batch_norm(part, kept[0], kept[1], weight, bias, True, 1.0, eps)
        for part, kept in zip(parts, statistics, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), statistics


def _normalise_across(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, eps: float, process_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Normalise the samples of all ranks of `process_group`, which hold equally many, as one group.

    Returns:
        The output of the local samples, and (1, 2, C) of the group's mean and unbiased variance.
    """
    with torch.no_grad():
        local = torch.zeros(2, x_BCHW.shape[1], dtype=weight.dtype, device=x_BCHW.device)
        torch.batch_norm_update_stats(x_BCHW, local[0], local[1], 1.0)
        ranks = dist.get_world_size(process_group)
        gathered = local.new_empty(ranks * 2, x_BCHW.shape[1])
        dist.all_gather_into_tensor(gathered, local, group=process_group)
        means_KC, variances_KC = gathered.view(ranks, 2, -1).unbind(1)
        # Means and centred squares, not sums of squares: no cancellation where the mean is large.
        samples = x_BCHW.numel() // x_BCHW.shape[1]
        mean = means_KC.mean(0)
        squares = (samples - 1) * variances_KC.sum(0) + samples * (means_KC - mean).square().sum(0)
        statistics = torch.stack([mean, squares / (ranks * samples - 1)])
    output: Tensor = _Across.apply(x_BCHW, weight, bias, mean, squares / (ranks * samples), eps, process_group)
    return output, statistics.unsqueeze(0)


class _Across(torch.autograd.Function):
    """Normalisation by statistics that were gathered over ranks; the backward pass sums its two reductions over them.

    Only the activation itself is kept, in its own dtype. The gradients of weight and bias are those of the local
    samples: the data-parallel engine adds them up, as it does for every other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        process_group: dist.ProcessGroup,
    ) -> Tensor:
        """The evaluation kernel, fed with the group's mean and biased variance."""
        ctx.save_for_backward(x_BCHW, weight, mean, variance)
        ctx.eps, ctx.process_group = eps, process_group
        return F.batch_norm(x_BCHW, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the activation, the weight and the bias.

        With s = 1 / sqrt(var + eps), z = s (x - mean) and means over the whole group,
        dx = w s (dy - mean(dy) - z mean(dy z)).
        """
        x_BCHW, weight, mean, variance = ctx.saved_tensors
        channels_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
        gradient = gradients[0].contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        # The kernel's evaluation mode holds the statistics constant: w s dy, sum(dy z), sum(dy).
        direct, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, x_BCHW, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([bias_gradient, weight_gradient])
        dist.all_reduce(sums, group=ctx.process_group)
        count = x_BCHW.numel() // x_BCHW.shape[1] * dist.get_world_size(ctx.process_group)
        inverse = torch.rsqrt(variance + ctx.eps)
        slope = weight * inverse.square() * sums[1] / count
        offset = weight * inverse * sums[0] / count - slope * mean
        correction = x_BCHW * slope.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)
        return (direct - correction).to(x_BCHW.dtype), weight_gradient, bias_gradient, None, None, None, None
