"""Relative attention: softmax over q.k plus a learned value of the offset between query and key (the paper's eq. 3).

B: samples, N: tokens, H: attention heads, D: head size, C: channels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Backend = Literal["auto", "explicit", "sdpa"]


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


def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias_HNN: Tensor, backend: Backend) -> Tensor:
    """softmax(q.k / sqrt(D) + bias) v.

    Args:
        q_BHND: queries.
        k_BHND: keys.
        v_BHND: values.
        bias_HNN: added to the logits, one for all samples.
        backend: "explicit" writes the matrix of weights, with a float32 softmax; "sdpa" calls torch's fused kernels,
            which want the bias in the dtype of `q_BHND`;
            "auto" is explicit, except on CUDA. On a CPU a bias that is trained keeps SDPA off its fused kernel.

    Returns:
        (B, H, N, D) in the dtype of `v_BHND`.
    """
    if backend == "auto":
        backend = "sdpa" if q_BHND.is_cuda else "explicit"
    scale = q_BHND.shape[-1] ** -0.5
    if backend == "sdpa":
        # Four dimensions: a mask of three is refused by some fused kernels and silently slow in others.
        mask_1HNN = bias_HNN.to(q_BHND.dtype).unsqueeze(0)
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask_1HNN, scale=scale)
    products_BHNN = torch.matmul(q_BHND * scale, k_BHND.transpose(-2, -1))
    exact = torch.promote_types(products_BHNN.dtype, torch.float32)
    weights_BHNN = torch.softmax(products_BHNN + bias_HNN.to(exact), dim=-1)
    return torch.matmul(weights_BHNN.to(v_BHND.dtype), v_BHND)


class RelativeAttention(nn.Module):
    """Self-attention over the tokens of a grid, with one table of relative biases per head.

    Attributes:
        table: (H, 2 height - 1, 2 width - 1).
        index: see `relative_index`; not saved, because it follows from the grid.
    """

    index: Tensor

    def __init__(
        self, width_in: int, width: int, head_size: int, grid: tuple[int, int], backend: Backend = "auto"
    ) -> None:
        """Create the layer.

        Args:
            width_in: channels of the input.
            width: channels of queries, keys, values and output.
            head_size: D.
            grid: (height, width) of the feature map whose tokens come in, row by row.
            backend: see `attend`.

        Raises:
            ValueError: `head_size` does not divide `width`.
        """
        super().__init__()
        if width % head_size:
            raise ValueError(f"attention: head size {head_size} must divide the width {width}")
        self.heads, self.head_size, self.grid, self.backend = width // head_size, head_size, grid, backend
        self.qkv = nn.Linear(width_in, 3 * width)
        self.projection = nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros(self.heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.register_buffer("index", relative_index(*grid, device=self.table.device), persistent=False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, width_in) to (B, N, width)."""
        batch, tokens, _ = x_BNC.shape
        packed = self.qkv(x_BNC).view(batch, tokens, 3, self.heads, self.head_size)
        q_BHND, k_BHND, v_BHND = packed.permute(2, 0, 3, 1, 4).unbind(0)
        # Looked up in every pass: a bias that is kept between passes gets no gradient.
        bias_HNN = self.table.flatten(1).index_select(1, self.index).view(self.heads, tokens, tokens)
        y_BHND = attend(q_BHND, k_BHND, v_BHND, bias_HNN, self.backend)
        result: Tensor = self.projection(y_BHND.transpose(1, 2).reshape(batch, tokens, -1))
        return result
