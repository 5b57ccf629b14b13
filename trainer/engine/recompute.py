"""Which activations are kept for the backward pass."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import InputError
from models import norm
from trainer.machine.extras import require_fairscale

RunBlock = Callable[[Callable[..., Any], Tensor, Tensor | None], Tensor]


def run_block(kind: str, impl: str = "own", offload: bool = False) -> RunBlock | None:
    """How the network calls its blocks.

    None calls them plainly and keeps everything. "full" keeps a block's input only. "selective" keeps the outputs of
    convolutions, linear maps and attention, and makes the norms, GELUs and scalings before them again: these are most
    of what is kept and little of the work.

    A second pass sees the same inputs, the same stochastic-depth factors and the same arithmetic, and our BatchNorm
    does not count its statistics again. It draws no random numbers, so none are saved.

    Args:
        kind: parallel.recompute.
        impl: whose wrapper does "full", ours or "fairscale"'s.
        offload: let fairscale's wrapper keep the inputs in the host's memory.

    Raises:
        InputError: fairscale is missing, or asked for another kind than "full"; or offload without it.
    """
    if impl == "fairscale":
        if kind != "full":
            raise InputError(f"parallel.recompute = {kind!r}: fairscale wraps whole blocks; nearest valid: 'full'")
        require_fairscale("recompute_impl")
        return partial(_wrapped, offload)
    if offload:
        raise InputError("parallel.recompute_offload = True: only fairscale's wrapper does that; nearest valid: False")
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


class _Repeated(nn.Module):
    """A block as fairscale's wrapper, which wants a module of its own to change, runs it twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, drop: Tensor | None, autocast: torch.autocast, wants_gradient: Tensor) -> Tensor:
        """Run the block; the second time BatchNorm does not count."""
        from fairscale.nn.checkpoint import is_recomputing

        with autocast, norm.recomputing() if is_recomputing() else nullcontext():
            output: Tensor = self.block(x, drop)
        return output


def _wrapped(offload: bool, block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
    """Run `block` under fairscale's checkpoint_wrapper.

    The wrapper holds its module weakly and changes its forward method, so that each call wraps anew: the block stays
    as it is, for compilation and evaluation. fairscale (0.4.13) would repeat a pass of bf16 autocast in fp16 on CUDA
    and in fp32 on a CPU; it sees none, and both passes enter the same one inside. It warns where no input wants a
    gradient, as the pictures: an empty one does.
    """
    from fairscale.nn.checkpoint import checkpoint_wrapper

    assert isinstance(block, nn.Module), "fairscale wraps modules"
    kind = x.device.type
    autocast = torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
    repeated = checkpoint_wrapper(_Repeated(block), offload_to_cpu=offload)
    with torch.autocast(kind, enabled=False):
        output: Tensor = repeated(x, drop, autocast, torch.empty(0, device=x.device, requires_grad=True))
    return output
