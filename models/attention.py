"""Relative attention: softmax over q.k plus a learned value of the offset between query and key (the paper's eq. 3).

B: samples, N: tokens, H: attention heads, D: head size, C: channels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.design import RelativeBias

Backend = Literal["auto", "explicit", "sdpa", "flex"]
Lookup = Literal["index_select", "einsum"]
Segment = Callable[..., Tensor]  # calls its first argument on the others; `models.blocks` says what for

KEY_MULTIPLE = 8  # CUDA's memory-efficient kernel wants rows of the bias to begin at multiples of 8 elements


def plainly(work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call `work`: a segment that keeps everything for the backward pass."""
    return work(*inputs)


def relative_index(height: int, width: int, device: torch.device | str) -> Tensor:
    """For each pair (query, key) of a grid, row by row, the place of its offset in a flattened bias table.

    Returns:
        (N * N,) int32 with N = height * width, into a table of (2 height - 1) x (2 width - 1).
    """
    rows = torch.arange(height, dtype=torch.int32, device=device)
    columns = torch.arange(width, dtype=torch.int32, device=device)
    down = rows[:, None] - rows[None, :] + height - 1
    right = columns[:, None] - columns[None, :] + width - 1
    return (down[:, None, :, None] * (2 * width - 1) + right[None, :, None, :]).flatten()


def look_up(table: Tensor, index: Tensor, grid: tuple[int, int], lookup: Lookup) -> Tensor:
    """The bias of every pair (query, key), differentiable in the table.

    Args:
        table: (H, 2 height - 1, 2 width - 1).
        index: `relative_index` of the grid.
        grid: (height, width).
        lookup: "index_select" is the fastest on a CPU; "einsum", two products with one-hot matrices, has a backward
            pass without atomic additions, so that it repeats bitwise on CUDA.

    Returns:
        (H, N, N).
    """
    heads, (height, width) = len(table), grid
    tokens = height * width
    if lookup == "index_select":
        return table.flatten(1).index_select(1, index).view(heads, tokens, tokens)
    with torch.autocast(table.device.type, enabled=False):
        bias = torch.einsum("hrs,akr,bls->habkl", table, _one_hot(height, table), _one_hot(width, table))
    return bias.reshape(heads, tokens, tokens)


def _one_hot(side: int, like: Tensor) -> Tensor:
    """(side, side, 2 side - 1): one where the last index is the offset query - key, counted from the smallest."""
    places = torch.arange(side, device=like.device)
    offsets = places[:, None] - places[None, :] + side - 1
    return (offsets.unsqueeze(-1) == torch.arange(2 * side - 1, device=like.device)).to(like.dtype)


def resolve(backend: Backend, device: torch.device) -> Backend:
    """What "auto" means on `device`: the fused kernels on CUDA, the explicit form elsewhere.

    On a CPU a bias that is trained keeps SDPA off its fused kernel, and the explicit form is faster.
    """
    if backend != "auto":
        return backend
    return "sdpa" if device.type == "cuda" else "explicit"


def attend(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    bias_HNN: Tensor | None,
    backend: Backend,
    form: RelativeBias = "pre",
) -> Tensor:
    """softmax(q.k / sqrt(D) + bias) v; in the "post" form (softmax(q.k / sqrt(D)) + bias) v.

    Args:
        q_BHND: queries.
        k_BHND: keys.
        v_BHND: values.
        bias_HNN: one for all samples; None: none.
        backend: "explicit" writes the matrix of weights, with a float32 softmax; "sdpa" calls torch's fused kernels,
            which want the bias in the dtype of `q_BHND`; "flex" is torch's FlexAttention over `bias_HNN`, compiled on
            CUDA; "auto": see `resolve`.
        form: where the bias is added.

    Returns:
        (B, H, N, D) in the dtype of `v_BHND`.
    """
    backend = resolve(backend, q_BHND.device)
    before = bias_HNN if form == "pre" else None
    if backend == "sdpa":
        mask_1HNN = None if before is None else _mask(before.to(q_BHND.dtype))
        scale = q_BHND.shape[-1] ** -0.5
        y_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask_1HNN, scale=scale)
    elif backend == "flex":
        y_BHND = _flex(q_BHND, k_BHND, v_BHND, before)
    else:
        y_BHND = _explicit(q_BHND, k_BHND, v_BHND, before)
    if form == "post" and bias_HNN is not None:
        y_BHND = y_BHND + torch.matmul(bias_HNN.to(v_BHND.dtype), v_BHND)
    return y_BHND


def _mask(bias_HNN: Tensor) -> Tensor:
    """The bias as CUDA's memory-efficient kernel takes it without a copy: (1, H, N, N), its rows aligned.

    Four dimensions: a mask of three is refused by some fused kernels and silently slow in others.
    """
    tokens = bias_HNN.shape[-1]
    short = -tokens % KEY_MULTIPLE
    if short and bias_HNN.is_cuda:
        bias_HNN = F.pad(bias_HNN, (0, short))[..., :tokens]
    return bias_HNN.unsqueeze(0)


def _explicit(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias_HNN: Tensor | None) -> Tensor:
    """The formula as it stands."""
    products_BHNN = torch.matmul(q_BHND * q_BHND.shape[-1] ** -0.5, k_BHND.transpose(-2, -1))
    exact = torch.promote_types(products_BHNN.dtype, torch.float32)
    logits_BHNN = products_BHNN.to(exact)  # by itself: torch's sum of two dtypes is several times slower
    if bias_HNN is not None:
        logits_BHNN += bias_HNN.to(exact)  # in place: nothing keeps the products
    return torch.matmul(torch.softmax(logits_BHNN, dim=-1).to(v_BHND.dtype), v_BHND)


def _flex(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias_HNN: Tensor | None) -> Tensor:
    """FlexAttention with the bias read inside the kernel.

    Raises:
        RuntimeError: gradients are asked for on a CPU, where torch has no backward pass for it.
    """

    def score(products: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return products if bias_HNN is None else products + bias_HNN[head, query, key]

    if not q_BHND.is_cuda and torch.is_grad_enabled() and q_BHND.requires_grad:
        raise RuntimeError("model.attention = flex trains on CUDA only; nearest: explicit")
    kernel = _flex_kernel(compiled=q_BHND.is_cuda)
    result: Tensor = kernel(q_BHND, k_BHND, v_BHND, score_mod=score, scale=q_BHND.shape[-1] ** -0.5)
    return result


@cache
def _flex_kernel(compiled: bool) -> Callable[..., Any]:
    """torch's function, compiled where it is meant to be; uncompiled it writes the matrix of weights."""
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return cast(Callable[..., Any], flex_attention)
    # Each grid, batch size and gradient mode is a compilation; beyond its limit torch falls back to the matrix.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


class RelativeAttention(nn.Module):
    """Self-attention over the tokens of a grid, with one table of relative biases per head.

    Attributes:
        table: (H, 2 height - 1, 2 width - 1); None without relative bias.
        index: see `relative_index`; not saved, because it follows from the grid.
    """

    table: nn.Parameter
    index: Tensor

    def __init__(
        self,
        width_in: int,
        width: int,
        head_size: int,
        grid: tuple[int, int],
        backend: Backend = "auto",
        form: RelativeBias = "pre",
        lookup: Lookup = "index_select",
    ) -> None:
        """Create the layer.

        Args:
            width_in: channels of the input.
            width: channels of queries, keys, values and output.
            head_size: D.
            grid: (height, width) of the feature map whose tokens come in, row by row.
            backend: see `attend`.
            form: where the bias is added, if there is one.
            lookup: see `look_up`.

        Raises:
            ValueError: `head_size` does not divide `width`.
        """
        super().__init__()
        if width % head_size:
            raise ValueError(f"attention: head size {head_size} must divide the width {width}")
        self.heads, self.head_size, self.grid, self.backend = width // head_size, head_size, grid, backend
        self.form, self.lookup = form, lookup
        self.qkv = nn.Linear(width_in, 3 * width)
        self.projection = nn.Linear(width, width)
        self._keeping, self._kept = False, cast("tuple[Any, Tensor] | None", None)
        if form == "none":
            self.register_parameter("table", None)
            return
        self.table = nn.Parameter(torch.zeros(self.heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.register_buffer("index", relative_index(*grid, device=self.table.device), persistent=False)

    def forward(
        self, x_BNC: Tensor, before: Callable[[Tensor], Tensor] | None = None, segment: Segment = plainly
    ) -> Tensor:
        """(B, N, width_in) to (B, N, width).

        Args:
            before: applied to the tokens first (norm, pool), in one segment with the first product.
            segment: see `models.blocks`.
        """

        def pack(x: Tensor) -> Tensor:
            result: Tensor = self.qkv(x if before is None else before(x))
            return result

        result: Tensor = self.projection(self._mix(segment(pack, x_BNC)))
        return result

    def bias(self) -> Tensor | None:
        """(H, N, N); None without relative bias."""
        if self.form == "none":
            return None
        # Kept only inside `kept_biases`: in training a bias that outlives its pass gets no gradient.
        if not self._keeping or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return look_up(self.table, self.index, self.grid, self.lookup)
        key = (self.table.data_ptr(), self.table._version, self.table.shape)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, look_up(self.table, self.index, self.grid, self.lookup)
        return self._kept[1]

    def _mix(self, packed: Tensor) -> Tensor:
        """(B, N, 3 width) of queries, keys and values to (B, N, width)."""
        batch, tokens, _ = packed.shape
        parts = packed.view(batch, tokens, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        q_BHND, k_BHND, v_BHND = parts.unbind(0)
        y_BHND = attend(q_BHND, k_BHND, v_BHND, self.bias(), self.backend, self.form)
        return y_BHND.transpose(1, 2).reshape(batch, tokens, -1)


@contextmanager
def kept_biases(model: nn.Module) -> Iterator[None]:
    """Look every bias of `model` up once, for passes without gradients while the weights stay as they are.

    What was kept is forgotten at the end, and when a table was replaced or written to by torch's own operations.
    Whoever writes to weights behind torch's back says so by `forget_biases`.
    """
    layers = _layers(model)
    for layer in layers:
        layer._keeping = True
    try:
        yield
    finally:
        for layer in layers:
            layer._keeping, layer._kept = False, None


def forget_biases(model: nn.Module) -> None:
    """The weights have changed: look the biases up again."""
    for layer in _layers(model):
        layer._kept = None


def _layers(model: nn.Module) -> list[RelativeAttention]:
    """Every attention of `model`, in order."""
    return [module for module in model.modules() if isinstance(module, RelativeAttention)]
