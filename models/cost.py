"""Parameters, multiply-adds and bytes kept of every block, counted from the spec alone. No torch.

Counted are convolutions, linear layers, queries x keys, weights x values, squeeze-excite and the head; nothing
element-wise (COATNET.md section 3). The paper prints multiply-adds as FLOPs. The bytes that a block keeps for the
backward pass, and those it sends on, are counted in `models.activations`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from models.activations import activations as activations
from models.activations import peak as peak
from models.spec import SPECS, BlockSpec, Kind, Resolution, Spec, Stride

Count = tuple[int, int]  # parameters, multiply-adds of one picture


class Weight(NamedTuple):
    """One trained tensor of a block.

    Attributes:
        path: inside the block: "attention.qkv.weight".
        elements: values.
        kind: "map" of a convolution or linear map, which autocast takes in bf16, its bias too; else of a norm, or a
            table of relative biases.
        decays: a kernel, to which weight decay applies: of two or four dimensions.
    """

    path: str
    elements: int
    kind: Literal["map", "batch_norm", "layer_norm", "table"]
    decays: bool


@dataclass(frozen=True)
class BlockCost:
    """One block of the flat list, under the network's own name for it ("blocks.s3.4").

    Attributes:
        weights: in the order of the module's own parameters.
        multiply_adds: of one picture's forward pass.
    """

    name: str
    stage: str
    weights: tuple[Weight, ...]
    multiply_adds: int

    @cached_property
    def parameters(self) -> int:
        """Trained values, relative-bias tables included."""
        return sum(weight.elements for weight in self.weights)

    @cached_property
    def largest(self) -> int:
        """Elements of its largest parameter."""
        return max(weight.elements for weight in self.weights)


@dataclass(frozen=True)
class Cost:
    """A whole network at one resolution, block by block in the order of the forward pass."""

    blocks: tuple[BlockCost, ...]

    @property
    def parameters(self) -> int:
        """Trained values, relative-bias tables included."""
        return sum(block.parameters for block in self.blocks)

    @property
    def multiply_adds(self) -> int:
        """Of one picture's forward pass."""
        return sum(block.multiply_adds for block in self.blocks)

    def by_stage(self) -> dict[str, Count]:
        """(parameters, multiply-adds) of each stage, stem first, "head" last."""
        sums: dict[str, Count] = {}
        for block in self.blocks:
            parameters, multiply_adds = sums.get(block.stage, (0, 0))
            sums[block.stage] = parameters + block.parameters, multiply_adds + block.multiply_adds
        return sums


@lru_cache(maxsize=256)
def count(spec: Spec, resolution: Resolution = 224, stride: Stride | None = None, classes: int = 1000) -> Cost:
    """The cost of `spec` for pictures of `resolution` pixels.

    Args:
        spec: the network as data.
        resolution: pixels; (height, width) where not square.
        stride: which MBConv convolution down-samples; None: the spec's own.
        classes: outputs of the classifier.

    Raises:
        InputError: a resolution that the network's total stride does not divide.
    """
    placed = stride or spec.stride
    blocks = []
    for block in spec.blocks(resolution):
        parts = _COUNTERS[block.kind](spec, block, placed, classes)
        weights = tuple(weight for part in parts for weight in part[0])
        blocks.append(BlockCost(block.name, block.stage, weights, sum(work for _, work in parts)))
    return Cost(tuple(blocks))


def table(resolution: Resolution = 224, stride: Stride | None = None) -> list[dict[str, str | int | float | None]]:
    """One row for every model, for `coatnet models`.

    Keys: `name, resolution, stride, parameters, multiply_adds, published_parameters, published_multiply_adds`. A
    published figure is None where the paper has none: for multiply-adds, none at this resolution with this stride
    (the dagger rows of CoAtNet-3 belong to the depthwise stride). The paper prints one parameter count per model
    while the bias tables grow with resolution, so that a deviation in parameters is to be judged at 224.

    Args:
        resolution: as in `count`.
        stride: for every row; None: each model's own.

    Raises:
        InputError: see `count`.
    """
    rows: list[dict[str, str | int | float | None]] = []
    for spec in SPECS.values():
        placed = stride or spec.stride
        cost = count(spec, resolution, placed)
        height, width = spec.size(resolution)
        rows.append(
            {
                "name": spec.name,
                "resolution": height if height == width else f"{height}x{width}",
                "stride": placed,
                "parameters": cost.parameters,
                "multiply_adds": cost.multiply_adds,
                "published_parameters": spec.published.parameters,
                "published_multiply_adds": spec.published.multiply_adds_at(resolution, placed),
            }
        )
    return rows


Part = tuple[tuple[Weight, ...], int]  # trained tensors, multiply-adds of one picture


def _dense(path: str, width_in: int, width: int, positions: int, bias: bool = True, taps: int = 1) -> Part:
    """A linear layer, or a convolution with `taps` weights per pair of channels, at `positions` outputs."""
    kernel = Weight(f"{path}.weight", width_in * width * taps, "map", True)
    offsets = (Weight(f"{path}.bias", width, "map", False),) if bias else ()
    return (kernel, *offsets), kernel.elements * positions


def _norm(path: str, width: int, kind: Literal["batch_norm", "layer_norm"] = "layer_norm") -> Part:
    """Scale and shift."""
    return (Weight(f"{path}.weight", width, kind, False), Weight(f"{path}.bias", width, kind, False)), 0


def _stem(spec: Spec, block: BlockSpec, stride: Stride, classes: int) -> list[Part]:
    """Two convolutions with a norm between; both write the halved grid."""
    positions, taps = block.grid[0] * block.grid[1], spec.kernel**2
    return [
        _dense("conv1", block.width_in, block.width, positions, taps=taps),
        _norm("norm", block.width, "batch_norm"),
        _dense("conv2", block.width, block.width, positions, taps=taps),
    ]


def _patches(spec: Spec, block: BlockSpec, stride: Stride, classes: int) -> list[Part]:
    """One convolution whose stride is its kernel."""
    return [_dense("conv", block.width_in, block.width, block.grid[0] * block.grid[1], taps=block.stride**2)]


def _shortcut(block: BlockSpec) -> list[Part]:
    """The identity branch: a linear map of the pooled input where the width changes."""
    if block.width_in == block.width:
        return []
    return [_dense("shortcut", block.width_in, block.width, block.grid[0] * block.grid[1])]


def _mbconv(spec: Spec, block: BlockSpec, stride: Stride, classes: int) -> list[Part]:
    """Expansion, depthwise convolution, squeeze-excite, projection; the expansion runs before or after the halving."""
    hidden, squeezed = spec.expansion * block.width, int(spec.se_ratio * block.width)
    positions = block.grid[0] * block.grid[1]
    expanded = positions if stride == "expansion" else block.grid_in[0] * block.grid_in[1]
    kind: Literal["batch_norm", "layer_norm"] = "layer_norm" if spec.conv_norm == "layer" else "batch_norm"
    return [
        _norm("norm_in", block.width_in, kind),
        _dense("expand", block.width_in, hidden, expanded, bias=False),
        _norm("norm_expand", hidden, kind),
        _dense("depthwise", 1, hidden, positions, bias=False, taps=spec.kernel**2),
        _norm("norm_depthwise", hidden, kind),
        _dense("squeeze", hidden, squeezed, 1),
        _dense("excite", squeezed, hidden, 1),
        _dense("project", hidden, block.width, positions),
        *_shortcut(block),
    ]


def _transformer(spec: Spec, block: BlockSpec, stride: Stride, classes: int) -> list[Part]:
    """Relative attention and the feed-forward part, on the tokens left after the pool."""
    (height, width), channels = block.grid, block.width
    tokens, hidden = height * width, spec.expansion * block.width
    offsets = channels // spec.head_size * (2 * height - 1) * (2 * width - 1)
    table = (Weight("attention.table", offsets, "table", False),) if spec.relative_bias != "none" else ()
    products = 3 if spec.relative_bias == "post" else 2  # the bias times the values is a product of its own
    return [
        _norm("norm_attention", block.width_in),
        (table, products * tokens * tokens * channels),
        _dense("attention.qkv", block.width_in, 3 * channels, tokens),
        _dense("attention.projection", channels, channels, tokens),
        *_shortcut(block),
        _norm("norm_feed", channels),
        _dense("widen", channels, hidden, tokens),
        _dense("narrow", hidden, channels, tokens),
    ]


def _head(spec: Spec, block: BlockSpec, stride: Stride, classes: int) -> list[Part]:
    """Norm, hidden layer and classifier on the pooled features."""
    width = block.width
    return [_norm("norm", width), _dense("hidden", width, width, 1), _dense("classifier", width, classes, 1)]


_COUNTERS: dict[Kind, Callable[[Spec, BlockSpec, Stride, int], list[Part]]] = {
    "stem": _stem,
    "patches": _patches,
    "mbconv": _mbconv,
    "transformer": _transformer,
    "head": _head,
}
