"""The four kinds of blocks: stem, MBConv, Transformer, head. Each maps one tensor to one tensor (COATNET.md section 2).

B: samples, C: channels, H, W: height and width, N = H W tokens, S: sub-layers of the block, K: classes.
Convolution blocks are (B, C, H, W) in the memory format of their input; Transformer blocks are (B, N, C).
`drop_SB` holds stochastic depth's factor of every residual branch and sample, 0 or 1 / keep; None: no branch scaled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Backend, RelativeAttention
from models.norm import BatchNorm
from models.spec import BlockSpec, Spec, Stride

LAYER_NORM_EPS = 1e-5


class Stem(nn.Module):
    """Two convolutions, the first with stride 2, and a norm between them."""

    def __init__(self, block: BlockSpec, spec: Spec, momentum: float) -> None:
        """Create the stem; `momentum` is BatchNorm's."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = ()
        width, padding = block.width, spec.kernel // 2
        self.conv1 = nn.Conv2d(block.width_in, width, spec.kernel, stride=2, padding=padding)
        self.norm = BatchNorm(width, momentum=momentum)
        self.conv2 = nn.Conv2d(width, width, spec.kernel, padding=padding)

    def forward(self, x_BCHW: Tensor, drop_SB: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) to (B, C, H/2, W/2)."""
        result: Tensor = self.conv2(_gelu(self.norm(self.conv1(x_BCHW))))
        return result


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-excite, pre-activation: shortcut(x) + Module(Norm(x))."""

    def __init__(self, block: BlockSpec, spec: Spec, stride: Stride, drop_rate: float, momentum: float) -> None:
        """Create the block.

        Args:
            block: its widths and grids.
            spec: expansion, squeeze-excite ratio and kernel.
            stride: which convolution has stride 2 when the block down-samples.
            drop_rate: of its one residual branch.
            momentum: BatchNorm's.
        """
        super().__init__()
        self.drop_rates: tuple[float, ...] = (drop_rate,)
        self.downsample = block.downsample
        hidden, squeezed = spec.expansion * block.width, int(spec.se_ratio * block.width)
        step = 2 if block.downsample else 1
        first, second = (step, 1) if stride == "expansion" else (1, step)
        self.norm_in = BatchNorm(block.width_in, momentum=momentum)
        self.expand = nn.Conv2d(block.width_in, hidden, 1, stride=first, bias=False)
        self.norm_expand = BatchNorm(hidden, momentum=momentum)
        self.depthwise = nn.Conv2d(
            hidden, hidden, spec.kernel, stride=second, padding=spec.kernel // 2, groups=hidden, bias=False
        )
        self.norm_depthwise = BatchNorm(hidden, momentum=momentum)
        self.squeeze = nn.Conv2d(hidden, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, hidden, 1)
        self.project = nn.Conv2d(hidden, block.width, 1)
        self.shortcut = nn.Conv2d(block.width_in, block.width, 1) if block.width_in != block.width else None

    def forward(self, x_BCHW: Tensor, drop_SB: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) to (B, C, H, W), or to half of H and W where the block down-samples."""
        y_BCHW = _gelu(self.norm_expand(self.expand(self.norm_in(x_BCHW))))
        y_BCHW = _gelu(self.norm_depthwise(self.depthwise(y_BCHW)))
        gate_BC11 = F.silu(self.squeeze(y_BCHW.mean((2, 3), keepdim=True)))
        y_BCHW = self.project(y_BCHW * torch.sigmoid(self.excite(gate_BC11)))
        identity = F.max_pool2d(x_BCHW, 2) if self.downsample else x_BCHW
        if self.shortcut is not None:
            identity = self.shortcut(identity)
        return _join(identity, y_BCHW, drop_SB, 0)


class Transformer(nn.Module):
    """Relative attention and a feed-forward part, pre-norm; the first block of a stage may halve the grid."""

    def __init__(self, block: BlockSpec, spec: Spec, drop_rate: float, backend: Backend) -> None:
        """Create the block; `drop_rate` is that of both its residual branches."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = (drop_rate, drop_rate)
        self.downsample, self.grid_in = block.downsample, block.grid_in
        width, hidden = block.width, spec.expansion * block.width
        self.norm_attention = nn.LayerNorm(block.width_in, eps=LAYER_NORM_EPS)
        self.attention = RelativeAttention(block.width_in, width, spec.head_size, block.grid, backend)
        self.shortcut = nn.Linear(block.width_in, width) if block.width_in != width else None
        self.norm_feed = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor, drop_SB: Tensor | None = None) -> Tensor:
        """(B, N, C_in), or (B, C_in, H, W) from a convolution stage, to (B, N, C): N / 4 tokens if down-sampling."""
        # The network's one change of layout; free when the feature map is channels_last.
        x_BNC = x.flatten(2).transpose(1, 2).contiguous() if x.dim() == 4 else x
        y_BNC = self.norm_attention(x_BNC)
        if self.downsample:
            x_BNC, y_BNC = _pool(x_BNC, self.grid_in), _pool(y_BNC, self.grid_in)
        identity = x_BNC if self.shortcut is None else self.shortcut(x_BNC)
        x_BNC = _join(identity, self.attention(y_BNC), drop_SB, 0)
        return _join(x_BNC, self.narrow(_gelu(self.widen(self.norm_feed(x_BNC)))), drop_SB, 1)


class Head(nn.Module):
    """Mean over the grid, norm, a hidden layer with tanh, classifier."""

    def __init__(self, width: int, classes: int) -> None:
        """Create the head for features of `width` channels."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = ()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.hidden = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor, drop_SB: Tensor | None = None) -> Tensor:
        """(B, N, C), or (B, C, H, W), to logits (B, K)."""
        pooled_BC = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        result: Tensor = self.classifier(torch.tanh(self.hidden(self.norm(pooled_BC))))
        return result


Block = Stem | MBConv | Transformer | Head


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (COATNET.md section 2)."""
    return F.gelu(x, approximate="tanh")


def _join(identity: Tensor, branch: Tensor, drop_SB: Tensor | None, sub_layer: int) -> Tensor:
    """The identity plus the residual branch, each sample's branch times its factor of stochastic depth."""
    if drop_SB is None:
        return identity + branch
    factor = drop_SB[sub_layer].to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
    return identity + branch * factor


def _pool(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """2x2 max pool of the tokens of `grid`, row by row; the tokens are seen as a channels_last map and not copied."""
    x_BCHW = x_BNC.view(len(x_BNC), *grid, -1).permute(0, 3, 1, 2)
    return F.max_pool2d(x_BCHW, 2).permute(0, 2, 3, 1).flatten(1, 2)
