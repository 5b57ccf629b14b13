"""The paper's two losses over soft targets."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def softmax_loss(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Cross-entropy against a distribution over classes, mean over the batch."""
    return -(targets_BK * F.log_softmax(logits_BK, dim=-1)).sum(-1).mean()


def sigmoid_loss(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Independent binary cross-entropies, summed over classes, mean over the batch (multi-label pre-training)."""
    return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none").sum(-1).mean()


def loss_function(kind: Literal["softmax", "sigmoid"]) -> Loss:
    """The loss that a recipe names."""
    return softmax_loss if kind == "softmax" else sigmoid_loss
