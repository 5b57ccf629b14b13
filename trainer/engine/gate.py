"""Closes a step whose loss is not finite, or too large: its gradient is made not finite, so that no update follows.

All on the device, before anybody could have looked: what holds back an update without a finite gradient, on all ranks
alike and under every ZeRO stage and pipeline, holds back this one too.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.loss import Loss


class Gate:
    """A loss function for the micro-batches of one optimizer step.

    Args:
        loss_of: the loss itself, a mean over the micro-batch.
        count: micro-batches of the step.
        limit: of the step's loss, a mean over all replicas; infinite: only a loss that is not finite closes the gate,
            and the replicas need not exchange theirs.
        replicas: ranks that compute the losses of the other replicas; None: all.
    """

    def __init__(self, loss_of: Loss, count: int, limit: float, replicas: dist.ProcessGroup | None) -> None:
        self._loss_of, self._left, self._limit, self._replicas = loss_of, count, limit, replicas
        self._count = count
        self._total: Tensor | None = None

    def __call__(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """The loss, whose backward pass is open or closed; the last of the step decides on `limit`."""
        loss = self._loss_of(logits_BK, targets_BK)
        value = loss.detach()
        good = torch.isfinite(value)
        if math.isfinite(self._limit):
            self._total = value if self._total is None else self._total + value
            self._left -= 1
            if self._left == 0:
                mean = self._total / (self._count * dist.get_world_size(self._replicas))
                dist.all_reduce(mean, group=self._replicas)
                good = mean <= self._limit  # false for NaN
        gated: Tensor = _Gated.apply(loss, good)
        return gated


class _Gated(torch.autograd.Function):
    """A loss as it is; its gradient likewise, or NaN."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, good: Tensor) -> Tensor:
        """The loss."""
        ctx.save_for_backward(good)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient times one, or NaN."""
        (good,) = ctx.saved_tensors
        return torch.where(good, gradients[0], math.nan), None
