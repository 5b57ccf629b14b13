"""CoAtNet a second time: plain and slow, from the formulas of the paper alone. The oracle of test_reference.py.

It shares no code and no table with `models`, and calls no layer of torch: convolutions are sums over shifted maps,
norms are means and variances, attention goes head by head and query by query. Feature maps are (B, C, H, W) from the
first block to the last, in Transformer blocks too.

B: samples, C: channels, H, W: height and width, N = H W tokens, D: head size, S: branches stochastic depth may drop.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]  # parameters and running statistics by name
Statistics = dict[str, tuple[Tensor, Tensor]]  # (mean, unbiased variance) by the name of the BatchNorm
Kind = Literal["stem", "patches", "C", "T"]  # C: MBConv, T: Transformer, as the paper abbreviates them
Row = tuple[str, Kind, int, int, int]  # name, kind, depth, width, stride of the first block


@dataclass(frozen=True)
class Description:
    """A network: its stages, and the choices that hold for all of them.

    Attributes:
        head_size: D.
        stride_in: the convolution of a down-sampling MBConv that has the stride.
        bias: the learned value of an offset: inside the softmax, outside, none.
        conv_norm: of MBConv.
    """

    stages: tuple[Row, ...]
    head_size: int
    stride_in: Literal["expansion", "depthwise"] = "expansion"
    bias: Literal["pre", "post", "none"] = "pre"
    conv_norm: Literal["batch", "layer"] = "batch"


def _five(*sizes: tuple[int, int], layout: tuple[Kind, ...] = ("C", "C", "T", "T")) -> tuple[Row, ...]:
    """A column of the size table without S3a, or another layout of the stages behind the stem."""
    rows = enumerate(zip(("stem", *layout), sizes, strict=True))
    return tuple((f"s{number}", kind, depth, width, 2) for number, (kind, (depth, width)) in rows)


def _six(*sizes: tuple[int, int]) -> tuple[Row, ...]:
    """A column of the size table with S3a and S3b, whose first block keeps the resolution."""
    names, strides = ("s0", "s1", "s2", "s3a", "s3b", "s4"), (2, 2, 2, 2, 1, 2)
    kinds: tuple[Kind, ...] = ("stem", "C", "C", "C", "T", "T")
    return tuple((n, k, *size, s) for n, k, size, s in zip(names, kinds, sizes, strides, strict=True))


# COATNET.md section 1, read down the columns: (L, D).
TABLE = {
    "coatnet0": Description(_five((2, 64), (2, 96), (3, 192), (5, 384), (2, 768)), 32),
    "coatnet1": Description(_five((2, 64), (2, 96), (6, 192), (14, 384), (2, 768)), 32),
    "coatnet2": Description(_five((2, 128), (2, 128), (6, 256), (14, 512), (2, 1024)), 32),
    "coatnet3": Description(_five((2, 192), (2, 192), (6, 384), (14, 768), (2, 1536)), 32),
    "coatnet3-dagger": Description(_five((2, 192), (2, 192), (6, 384), (14, 768), (2, 1536)), 32, "depthwise"),
    "coatnet4": Description(_five((2, 192), (2, 192), (12, 384), (28, 768), (2, 1536)), 32),
    "coatnet5": Description(_five((2, 192), (2, 256), (12, 512), (28, 1280), (2, 2048)), 64),
    "coatnet6": Description(_six((2, 192), (2, 192), (4, 384), (8, 768), (42, 1536), (2, 3072)), 128),
    "coatnet6-table12": Description(_six((2, 192), (2, 192), (4, 384), (8, 768), (42, 1536), (2, 2048)), 128),
    "coatnet7": Description(_six((2, 192), (2, 256), (4, 512), (8, 1024), (42, 2048), (2, 3072)), 128),
}

# The layouts of the paper's study, at the sizes that this project chose for them.
STUDY = {
    "C-C-C-C": Description(_five((2, 64), (2, 96), (9, 192), (7, 384), (2, 768), layout=("C", "C", "C", "C")), 32),
    "C-C-C-T": Description(_five((2, 64), (2, 96), (10, 192), (5, 384), (2, 768), layout=("C", "C", "C", "T")), 32),
    "C-C-T-T": Description(_five((2, 64), (2, 96), (7, 192), (5, 384), (2, 768), layout=("C", "C", "T", "T")), 32),
    "C-T-T-T": Description(_five((2, 64), (2, 96), (3, 192), (5, 384), (2, 768), layout=("C", "T", "T", "T")), 32),
    "ViT_rel": Description((("s0", "patches", 1, 448, 16), ("s1", "T", 10, 448, 1)), 32),
}


def narrow(description: Description, divisor: int, head_size: int) -> Description:
    """The same network with every width divided, and another head size."""
    rows = tuple(
        (name, kind, depth, width // divisor, stride) for name, kind, depth, width, stride in description.stages
    )
    return replace(description, stages=rows, head_size=head_size)


def shapes(description: Description, resolution: tuple[int, int], classes: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, written down from COATNET.md section 2."""
    found: dict[str, tuple[int, ...]] = {}
    (height, width), before = resolution, 3
    for stage, kind, depth, c, stride in description.stages:
        for index in range(1 if kind in ("stem", "patches") else depth):
            if index == 0:
                step = 16 if kind == "patches" else stride
                height, width = height // step, width // step
            grid = (2 * height - 1, 2 * width - 1)
            block = _block_shapes(kind, before, c, (c // description.head_size, *grid), description.bias)
            found |= {f"blocks.{stage}.{index}.{leaf}": shape for leaf, shape in block}
            before = c
    found |= _weight_and_bias("blocks.head.0.norm", before)
    found |= _weight_and_bias("blocks.head.0.hidden", before, before)
    return found | _weight_and_bias("blocks.head.0.classifier", classes, before)


def _weight_and_bias(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A layer's two parameters: the bias has the weight's first side."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _block_shapes(
    kind: str, before: int, c: int, table: tuple[int, ...], bias: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(leaf, shape) of one block's parameters."""
    if kind == "patches":
        yield from _weight_and_bias("conv", c, before, 16, 16).items()
    elif kind == "stem":
        yield from _weight_and_bias("conv1", c, before, 3, 3).items()
        yield from _weight_and_bias("norm", c).items()
        yield from _weight_and_bias("conv2", c, c, 3, 3).items()
    elif kind == "C":
        yield "expand.weight", (4 * c, before, 1, 1)
        yield "depthwise.weight", (4 * c, 1, 3, 3)
        for name, channels in (("norm_in", before), ("norm_expand", 4 * c), ("norm_depthwise", 4 * c)):
            yield from _weight_and_bias(name, channels).items()
        yield from _weight_and_bias("squeeze", c // 4, 4 * c, 1, 1).items()
        yield from _weight_and_bias("excite", 4 * c, c // 4, 1, 1).items()
        yield from _weight_and_bias("project", c, 4 * c, 1, 1).items()
        if before != c:
            yield from _weight_and_bias("shortcut", c, before, 1, 1).items()
    else:
        yield from _weight_and_bias("norm_attention", before).items()
        yield from _weight_and_bias("attention.qkv", 3 * c, before).items()
        yield from _weight_and_bias("attention.projection", c, c).items()
        yield from _weight_and_bias("norm_feed", c).items()
        yield from _weight_and_bias("widen", 4 * c, c).items()
        yield from _weight_and_bias("narrow", c, 4 * c).items()
        if bias != "none":
            yield "attention.table", table
        if before != c:
            yield from _weight_and_bias("shortcut", c, before).items()


@dataclass
class _Pass:
    """One forward pass: what it reads, and the statistics it leaves."""

    state: State
    description: Description
    training: bool
    drop: Tensor | None
    branches: int = 0
    statistics: Statistics = field(default_factory=dict)

    def mix(self, name: str, x: Tensor) -> Tensor:
        """A linear map of the channels at every position; weights may be written as 1x1 convolutions."""
        weight = self.state[f"{name}.weight"]
        y = torch.einsum("bchw,dc->bdhw", x, weight.reshape(weight.shape[:2]))
        bias = self.state.get(f"{name}.bias")
        return y if bias is None else y + bias[:, None, None]

    def conv3(self, name: str, x: Tensor, stride: int) -> Tensor:
        """A dense 3x3 convolution with bias; one row or column of zeros on every side."""
        weight = self.state[f"{name}.weight"]
        y = sum(torch.einsum("bchw,dc->bdhw", part, weight[:, :, i, j]) for i, j, part in _shifts(x, stride))
        return torch.as_tensor(y) + self.state[f"{name}.bias"][:, None, None]

    def depthwise3(self, name: str, x: Tensor, stride: int) -> Tensor:
        """A 3x3 convolution of every channel by itself, without bias."""
        weight = self.state[f"{name}.weight"]
        return torch.as_tensor(sum(part * weight[:, 0, i, j, None, None] for i, j, part in _shifts(x, stride)))

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        """By the batch's statistics in training, by the running ones in evaluation; eps 1e-3."""
        if self.training:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            mean = x.sum((0, 2, 3)) / count
            variance = ((x - mean[:, None, None]) ** 2).sum((0, 2, 3)) / count
            self.statistics[name] = (mean.detach(), variance.detach() * count / (count - 1))
        else:
            mean, variance = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        z = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-3) ** 0.5
        return z * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """Over the channels of each position; eps 1e-5."""
        centred = x - x.mean(1, keepdim=True)
        z = centred / ((centred**2).mean(1, keepdim=True) + 1e-5) ** 0.5
        return z * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def residual(self, identity: Tensor, branch: Tensor) -> Tensor:
        """identity + branch, each sample's branch times its factor of stochastic depth."""
        if self.drop is not None:
            branch = branch * self.drop[self.branches].to(branch.dtype)[:, None, None, None]
        self.branches += 1
        return identity + branch

    def stem(self, name: str, x: Tensor, stride: int) -> Tensor:
        """Conv, BN, GELU, conv."""
        x = _gelu(self.batch_norm(f"{name}.norm", self.conv3(f"{name}.conv1", x, stride)))
        return self.conv3(f"{name}.conv2", x, 1)

    def patches(self, name: str, x: Tensor) -> Tensor:
        """Each 16x16 patch to one position, linearly."""
        batch, channels, height, width = x.shape
        cut = x.reshape(batch, channels, height // 16, 16, width // 16, 16)
        y = torch.einsum("bchiwj,dcij->bdhw", cut, self.state[f"{name}.conv.weight"])
        return y + self.state[f"{name}.conv.bias"][:, None, None]

    def mbconv(self, name: str, x: Tensor, stride: int, width: int) -> Tensor:
        """x + Module(Norm(x)), with squeeze-excite before the last convolution."""
        norm = self.batch_norm if self.description.conv_norm == "batch" else self.layer_norm
        in_expansion = self.description.stride_in == "expansion"
        y = norm(f"{name}.norm_in", x)
        if in_expansion:
            y = y[:, :, ::stride, ::stride]
        y = _gelu(norm(f"{name}.norm_expand", self.mix(f"{name}.expand", y)))
        y = self.depthwise3(f"{name}.depthwise", y, 1 if in_expansion else stride)
        y = _gelu(norm(f"{name}.norm_depthwise", y))
        gate = self.mix(f"{name}.squeeze", y.mean((2, 3), keepdim=True))
        gate = self.mix(f"{name}.excite", gate / (1 + torch.exp(-gate)))
        y = self.mix(f"{name}.project", y / (1 + torch.exp(-gate)))
        return self.residual(self.identity(name, x, stride, width), y)

    def identity(self, name: str, x: Tensor, stride: int, width: int) -> Tensor:
        """Proj(Pool(x)), each where it is needed."""
        if stride == 2:
            x = _pool(x)
        return x if x.shape[1] == width else self.mix(f"{name}.shortcut", x)

    def transformer(self, name: str, x: Tensor, stride: int, width: int) -> Tensor:
        """Relative attention, then the feed-forward part."""
        y = self.layer_norm(f"{name}.norm_attention", x)
        y = self.attention(f"{name}.attention", _pool(y) if stride == 2 else y, width)
        x = self.residual(self.identity(name, x, stride, width), y)
        y = _gelu(self.mix(f"{name}.widen", self.layer_norm(f"{name}.norm_feed", x)))
        return self.residual(x, self.mix(f"{name}.narrow", y))

    def attention(self, name: str, x: Tensor, width: int) -> Tensor:
        """Head by head: y_i = sum_j softmax_j(x_i.x_j + w_{i-j}) x_j, or softmax_j(x_i.x_j) + w_{i-j}."""
        size, (height, columns) = self.description.head_size, x.shape[2:]
        q, k, v = torch.split(self.mix(f"{name}.qkv", x).flatten(2), width, dim=1)
        heads = []
        for head in range(width // size):
            part = slice(head * size, (head + 1) * size)
            logits = torch.einsum("bdi,bdj->bij", q[:, part], k[:, part]) / math.sqrt(size)
            offsets: Tensor | float = 0.0
            if self.description.bias != "none":
                offsets = _of_offsets(self.state[f"{name}.table"][head], height, columns)
            if self.description.bias == "pre":
                logits = logits + offsets
            weights = torch.exp(logits - logits.detach().amax(2, keepdim=True))
            weights = weights / weights.sum(2, keepdim=True)
            if self.description.bias == "post":
                weights = weights + offsets
            heads.append(torch.einsum("bij,bdj->bdi", weights, v[:, part]))
        return self.mix(f"{name}.projection", torch.cat(heads, 1).reshape(-1, width, height, columns))

    def head(self, name: str, x: Tensor) -> Tensor:
        """Mean over the positions, LN, linear, tanh, linear."""
        x = self.layer_norm(f"{name}.norm", x.mean((2, 3), keepdim=True))
        return self.mix(f"{name}.classifier", torch.tanh(self.mix(f"{name}.hidden", x)))[:, :, 0, 0]


class Result(NamedTuple):
    """What a forward pass gives: logits, the last map of every stage, BatchNorm's statistics of a training batch."""

    logits: Tensor
    maps: dict[str, Tensor]
    statistics: Statistics


def reference_forward(
    state: State, description: Description, x: Tensor, training: bool, drop: Tensor | None = None
) -> Result:
    """The whole network on pictures.

    Args:
        state: parameters, and for evaluation running statistics.
        description: the network.
        x: (B, 3, H, W).
        training: BatchNorm's mode.
        drop: (S, B), the factor on each residual branch of each sample.
    """
    run, maps = _Pass(state, description, training, drop), {}
    for stage, kind, depth, width, first in description.stages:
        for index in range(1 if kind in ("stem", "patches") else depth):
            name, stride = f"blocks.{stage}.{index}", first if index == 0 else 1
            if kind == "stem":
                x = run.stem(name, x, stride)
            elif kind == "patches":
                x = run.patches(name, x)
            elif kind == "C":
                x = run.mbconv(name, x, stride, width)
            else:
                x = run.transformer(name, x, stride, width)
        maps[stage] = x
    assert drop is None or run.branches == len(drop)
    return Result(run.head("blocks.head.0", x), maps, run.statistics)


def _gelu(x: Tensor) -> Tensor:
    """GELU by its tanh form: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _pool(x: Tensor) -> Tensor:
    """The largest of every 2x2 positions."""
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _shifts(x: Tensor, stride: int) -> Iterator[tuple[int, int, Tensor]]:
    """(row, column) of a 3x3 kernel, and the zero-padded map that it multiplies."""
    height, width = x.shape[2:]
    padded = x.new_zeros(*x.shape[:2], height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    for i in range(3):
        for j in range(3):
            yield i, j, padded[:, :, i : i + height : stride, j : j + width : stride]


def _of_offsets(table: Tensor, height: int, width: int) -> Tensor:
    """(N, N) of table[query - key], zero offset in the centre of (2 height - 1, 2 width - 1).

    Seen from one query, keys run against the table: its window, turned by half a circle.
    """
    windows = [table[r : r + height, c : c + width].flip(0, 1) for r in range(height) for c in range(width)]
    return torch.stack(windows).flatten(1)
