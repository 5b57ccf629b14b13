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
    """How the network calls its blocks.

    None calls them plainly and keeps everything. "full" keeps a block's input only. "selective" keeps the outputs of
    convolutions, linear maps and attention, and makes the norms, GELUs and scalings before them again: these are most
    of what is kept and little of the work.

    A second pass sees the same inputs, the same stochastic-depth factors and the same arithmetic, and our BatchNorm
    does not count its statistics again. It draws no random numbers, so none are saved.
    """
    return {"none": None, "selective": _selective, "full": _inputs_only}[kind]


def _selective(block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
    """Run `block`, each of its segments keeping its inputs only.

    A segment ends in a convolution or a linear map. torch stops a second pass as soon as the last tensor
    is there that was wanted, which is the input of that last operation: it is not computed again.
    """
    result: Tensor = block(x, drop, _inputs_only)
    return result


def _inputs_only(work: Callable[..., Any], *inputs: Tensor | None) -> Tensor:
    """Run `work`, a block or a part of one, keeping its inputs only."""
    if not torch.is_grad_enabled():
        result: Tensor = work(*inputs)
        return result
    output: Tensor = checkpoint(work, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
    return output


def _contexts() -> tuple[Any, Any]:
    """The contexts of the first and of the second pass."""
    return nullcontext(), norm.recomputing()
