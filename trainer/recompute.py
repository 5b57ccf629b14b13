"""Which activations are kept for the backward pass."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models import norm

RunBlock = Callable[[Callable[..., Any], Tensor, Tensor | None], Tensor]


def run_block(kind: str) -> RunBlock | None:
    """How the network calls its blocks: None calls them plainly; "full" keeps a block's inputs only.

    The second pass of a recomputed block sees the same inputs, the same stochastic-depth factors and the same
    arithmetic, and our BatchNorm does not count its statistics again. It draws no random numbers, so none are saved.
    """
    return _full if kind == "full" else None


def _full(block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
    """Run `block`, keeping its inputs only."""
    if not torch.is_grad_enabled():
        result: Tensor = block(x, drop)
        return result
    output: Tensor = checkpoint(block, x, drop, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return output


def _contexts() -> tuple[Any, Any]:
    """The contexts of the first and of the second pass."""
    return nullcontext(), norm.recomputing()
