"""The kinds of blocks: stem, patches, MBConv, Transformer, head. Each maps one tensor to one (COATNET.md section 2).

B: samples, C: channels, H, W: height and width, N = H W tokens, S: sub-layers of the block, K: classes.
Convolution blocks are (B, C, H, W) in the memory format of their input; Transformer blocks are (B, N, C).
`drop_SB` holds stochastic depth's factor of every residual branch and sample, 0 or 1 / keep; None: no branch scaled.
`segment` calls the parts of a block that end in a convolution or a linear map. What selective recomputation keeps are
the inputs of these parts, and the attention; the norms, GELUs and scalings inside them are made again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import drop_path
from models.attention import Backend, Lookup, RelativeAttention, Segment, plainly
from models.design import BlockSpec, ConvNorm, Spec, Stride
from models.gelu import gelu
from models.norm import BatchNorm

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Choices:
    """How a run wants its blocks built, beside the spec.

    Attributes:
        stride: which MBConv convolution has stride 2 when the block down-samples.
        momentum: BatchNorm's, PyTorch's sense.
        attention: see `models.attention.attend`.
        lookup: see `models.attention.look_up`.
        drop_group: samples of which stochastic depth drops an exact count, whose Transformer branches are then not
            computed; 0: each sample drops by itself, and everything is computed.
    """

    stride: Stride
    momentum: float = 0.01
    attention: Backend = "auto"
    lookup: Lookup = "index_select"
    drop_group: int = 0


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a feature map (B, C, H, W); no copy if it is channels_last."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm_of(kind: ConvNorm, channels: int, momentum: float) -> nn.Module:
    """The norm of an MBConv block."""
    if kind == "layer":
        return ChannelNorm(channels, eps=LAYER_NORM_EPS)
    return BatchNorm(channels, momentum=momentum)


class Stem(nn.Module):
    """Two convolutions, the first with stride 2, and a norm between them."""

    def __init__(self, block: BlockSpec, spec: Spec, choices: Choices) -> None:
        """Create the stem."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = ()
        width, padding = block.width, spec.kernel // 2
        self.conv1 = nn.Conv2d(block.width_in, width, spec.kernel, stride=2, padding=padding)
        self.norm = BatchNorm(width, momentum=choices.momentum)
        self.conv2 = nn.Conv2d(width, width, spec.kernel, padding=padding)

    def forward(self, x_BCHW: Tensor, drop_SB: Tensor | None = None, segment: Segment = plainly) -> Tensor:
        """(B, 3, H, W) to (B, C, H/2, W/2); no segments: its two maps are cheap to keep, dear to make again."""
        result: Tensor = self.conv2(gelu(self.norm(self.conv1(x_BCHW))))
        return result


class Patches(nn.Module):
    """One convolution whose stride is its kernel: a ViT's stem."""

    def __init__(self, block: BlockSpec) -> None:
        """Create the stem."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = ()
        self.conv = nn.Conv2d(block.width_in, block.width, block.stride, stride=block.stride)

    def forward(self, x_BCHW: Tensor, drop_SB: Tensor | None = None, segment: Segment = plainly) -> Tensor:
        """(B, 3, H, W) to (B, C, H/stride, W/stride)."""
        result: Tensor = self.conv(x_BCHW)
        return result


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze-excite, pre-activation: shortcut(x) + Module(Norm(x))."""

    def __init__(self, block: BlockSpec, spec: Spec, drop_rate: float, choices: Choices) -> None:
        """Create the block; `drop_rate` is that of its one residual branch."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = (drop_rate,)
        self.pool = block.stride
        hidden, squeezed = spec.expansion * block.width, int(spec.se_ratio * block.width)
        first, second = (block.stride, 1) if choices.stride == "expansion" else (1, block.stride)
        self.norm_in = norm_of(spec.conv_norm, block.width_in, choices.momentum)
        self.expand = nn.Conv2d(block.width_in, hidden, 1, stride=first, bias=False)
        self.norm_expand = norm_of(spec.conv_norm, hidden, choices.momentum)
        self.depthwise = nn.Conv2d(
            hidden, hidden, spec.kernel, stride=second, padding=spec.kernel // 2, groups=hidden, bias=False
        )
        self.norm_depthwise = norm_of(spec.conv_norm, hidden, choices.momentum)
        self.squeeze = nn.Conv2d(hidden, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, hidden, 1)
        self.project = nn.Conv2d(hidden, block.width, 1)
        self.shortcut = nn.Conv2d(block.width_in, block.width, 1) if block.width_in != block.width else None

    def forward(self, x_BCHW: Tensor, drop_SB: Tensor | None = None, segment: Segment = plainly) -> Tensor:
        """(B, C_in, H, W) to (B, C, H, W), or to half of H and W where the block down-samples."""
        y_BCHW = segment(self._expand, x_BCHW)
        y_BCHW = segment(self._spread, y_BCHW)
        y_BCHW = segment(self._project, y_BCHW)
        identity = F.max_pool2d(x_BCHW, self.pool) if self.pool > 1 else x_BCHW
        if self.shortcut is not None:
            identity = self.shortcut(identity)
        return _join(identity, y_BCHW, drop_SB, 0)

    def _expand(self, x_BCHW: Tensor) -> Tensor:
        result: Tensor = self.expand(self.norm_in(x_BCHW))
        return result

    def _spread(self, y_BCHW: Tensor) -> Tensor:
        result: Tensor = self.depthwise(gelu(self.norm_expand(y_BCHW)))
        return result

    def _project(self, y_BCHW: Tensor) -> Tensor:
        y_BCHW = gelu(self.norm_depthwise(y_BCHW))
        y_BCHW, mean_BC11 = _WithMean.apply(y_BCHW)
        gate_BC11 = torch.sigmoid(self.excite(F.silu(self.squeeze(mean_BC11))))
        result: Tensor = self.project(y_BCHW * gate_BC11)
        return result


class _WithMean(torch.autograd.Function):
    """A feature map and its mean over space.

    The two gradients meet here in one pass over the map; autograd by itself would write the mean's out in full first.
    """

    @staticmethod
    def forward(ctx: Any, y_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The map itself, (B, C, H, W), and (B, C, 1, 1)."""
        # Not `mean`, which on a CPU copies a bf16 map to fp32; `sum` adds up in fp32 without a copy.
        return y_BCHW.view_as(y_BCHW), y_BCHW.sum((2, 3), keepdim=True) / y_BCHW.shape[2:].numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient of the map."""
        of_map, of_mean = gradients
        return torch.add(of_map, (of_mean / of_map.shape[2:].numel()).to(of_map.dtype))


class Transformer(nn.Module):
    """Relative attention and a feed-forward part, pre-norm; the first block of a stage may halve the grid."""

    def __init__(self, block: BlockSpec, spec: Spec, drop_rate: float, choices: Choices) -> None:
        """Create the block; `drop_rate` is that of both its residual branches."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = (drop_rate, drop_rate)
        self.pool, self.grid_in = block.stride, block.grid_in
        # How many of `drop_group` samples a branch leaves out; a constant, so that shapes do not depend on the batch.
        self.drop_group = choices.drop_group
        self.left_out = drop_path.dropped(drop_rate, choices.drop_group) if choices.drop_group else 0
        width, hidden = block.width, spec.expansion * block.width
        self.norm_attention = nn.LayerNorm(block.width_in, eps=LAYER_NORM_EPS)
        self.attention = RelativeAttention(
            block.width_in, width, spec.head_size, block.grid, choices.attention, spec.relative_bias, choices.lookup
        )
        self.shortcut = nn.Linear(block.width_in, width) if block.width_in != width else None
        self.norm_feed = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor, drop_SB: Tensor | None = None, segment: Segment = plainly) -> Tensor:
        """(B, N, C_in), or (B, C_in, H, W) from a convolution stage, to (B, N, C): N / 4 tokens if down-sampling."""
        # The network's one change of layout; free when the feature map is channels_last.
        x_BNC = x.flatten(2).transpose(1, 2).contiguous() if x.dim() == 4 else x
        identity = _pool(x_BNC, self.grid_in, self.pool)
        if self.shortcut is not None:
            identity = self.shortcut(identity)

        def attend(kept_BNC: Tensor) -> Tensor:
            result: Tensor = self.attention(kept_BNC, self._prepare, segment)
            return result

        def feed(kept_BNC: Tensor) -> Tensor:
            return segment(self._narrow, segment(self._widen, kept_BNC))

        x_BNC = self._add(identity, x_BNC, attend, drop_SB, 0)
        return self._add(x_BNC, x_BNC, feed, drop_SB, 1)

    def _add(
        self, identity: Tensor, x_BNC: Tensor, branch: Callable[[Tensor], Tensor], drop_SB: Tensor | None, layer: int
    ) -> Tensor:
        """The identity plus a branch of `x_BNC`, computed for the kept samples alone where their count is exact."""
        if drop_SB is None or not self.left_out:
            return _join(identity, branch(x_BNC), drop_SB, layer)
        count = len(x_BNC) - len(x_BNC) // self.drop_group * self.left_out
        kept = torch.argsort((drop_SB[layer] == 0).to(torch.int8), stable=True)[:count]
        y_BNC = branch(x_BNC.index_select(0, kept))
        factor = drop_SB[layer].index_select(0, kept).to(y_BNC.dtype).view(-1, 1, 1)
        return identity.index_add(0, kept, (y_BNC * factor).to(identity.dtype))

    def _prepare(self, x_BNC: Tensor) -> Tensor:
        return _pool(self.norm_attention(x_BNC), self.grid_in, self.pool)

    def _widen(self, x_BNC: Tensor) -> Tensor:
        result: Tensor = self.widen(self.norm_feed(x_BNC))
        return result

    def _narrow(self, x_BNC: Tensor) -> Tensor:
        result: Tensor = self.narrow(gelu(x_BNC))
        return result


class Head(nn.Module):
    """Mean over the grid, norm, a hidden layer with tanh, classifier."""

    def __init__(self, width: int, classes: int) -> None:
        """Create the head for features of `width` channels."""
        super().__init__()
        self.drop_rates: tuple[float, ...] = ()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.hidden = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor, drop_SB: Tensor | None = None, segment: Segment = plainly) -> Tensor:
        """(B, N, C), or (B, C, H, W), to logits (B, K)."""
        pooled_BC = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        result: Tensor = self.classifier(torch.tanh(self.hidden(self.norm(pooled_BC))))
        return result


Block = Stem | Patches | MBConv | Transformer | Head


def _join(identity: Tensor, branch: Tensor, drop_SB: Tensor | None, sub_layer: int) -> Tensor:
    """The identity plus the residual branch, each sample's branch times its factor of stochastic depth."""
    if drop_SB is None:
        return identity + branch
    factor = drop_SB[sub_layer].to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
    return identity + branch * factor


def _pool(x_BNC: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Max pool of the tokens of `grid`, row by row; the tokens are seen as a channels_last map and not copied."""
    if stride == 1:
        return x_BNC
    x_BCHW = x_BNC.view(len(x_BNC), *grid, -1).permute(0, 3, 1, 2)
    return F.max_pool2d(x_BCHW, stride).permute(0, 2, 3, 1).flatten(1, 2)
