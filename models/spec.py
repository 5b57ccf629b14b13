"""CoAtNet-0..7 and variants as data: widths, depths, head sizes, and what the paper prints about them. No torch.

Source: Dai, Liu, Le, Tan, "CoAtNet: Marrying Convolution and Attention for All Data Sizes", arXiv 2106.04803 v2.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from configs.errors import InputError, unknown

Stride = Literal["expansion", "depthwise"]
Kind = Literal["stem", "mbconv", "transformer", "head"]
Resolution = int | tuple[int, int]  # pixels: a square, or (height, width)

SUB_LAYERS: dict[Kind, int] = {"stem": 0, "mbconv": 1, "transformer": 2, "head": 0}  # that stochastic depth drops


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind and width.

    Attributes:
        name: "s0" .. "s4"; "s3a" and "s3b" where the third stage has two kinds of blocks.
        depth: blocks; of the stem, its convolutions, which form one block.
        width: channels.
        downsample: the first block halves height and width.
    """

    name: str
    block: Literal["stem", "mbconv", "transformer"]
    depth: int
    width: int
    downsample: bool = True


@dataclass(frozen=True)
class Published:
    """What the paper prints about a model; None and absent where it prints nothing.

    Attributes:
        parameters: rounded as printed. The paper gives one figure per model whatever the resolution.
        multiply_adds: (resolution, stride, multiply-adds of one picture's forward pass); the paper calls them FLOPs.
        core_days: TPUv3-core-days of pre-training on JFT (table 5).
        tables: the tables with these figures.
    """

    parameters: float | None = None
    multiply_adds: tuple[tuple[int, Stride, float], ...] = ()
    core_days: int | None = None
    tables: tuple[int, ...] = ()

    def multiply_adds_at(self, resolution: Resolution, stride: Stride) -> float | None:
        """The printed multiply-adds for this resolution and stride placement, None where there are none."""
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        for pixels, placed, count in self.multiply_adds:
            if (pixels, pixels, placed) == (height, width, stride):
                return count
        return None


@dataclass(frozen=True)
class BlockSpec:
    """One block of a network at one resolution.

    Attributes:
        name: "blocks.<stage>.<index>", the prefix of its parameters' names.
        width_in, width: channels before and after.
        grid_in, grid: (height, width) of the feature map before and after.
    """

    name: str
    stage: str
    kind: Kind
    width_in: int
    width: int
    downsample: bool
    grid_in: tuple[int, int]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Spec:
    """A network as data.

    Attributes:
        head_size: channels of one attention head.
        expansion: hidden over output width, in MBConv and in the feed-forward part.
        se_ratio: squeeze width over an MBConv's output width.
        kernel: side of the stem's and the depthwise convolutions.
        stride: the convolution of a down-sampling MBConv that has stride 2, unless the caller says otherwise.
        kernel_std: standard deviation of initial kernels and bias tables.
    """

    name: str
    stages: tuple[Stage, ...]
    head_size: int
    expansion: int = 4
    se_ratio: float = 0.25
    kernel: int = 3
    stride: Stride = "expansion"
    kernel_std: float = 0.02
    published: Published = field(default_factory=Published)

    def size(self, resolution: Resolution) -> tuple[int, int]:
        """(height, width) in pixels.

        Raises:
            InputError: a side is not a positive multiple of the network's total stride.
        """
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        total: int = 2 ** sum(stage.downsample for stage in self.stages)
        for side in (height, width):
            if side < total or side % total:
                raise InputError(
                    f"resolution = {side}: must be a positive multiple of {total}, the total stride of {self.name}; "
                    f"nearest valid: {max(total, round(side / total) * total)}"
                )
        return height, width

    def blocks(self, resolution: Resolution) -> tuple[BlockSpec, ...]:
        """Every block from the stem to the head in the order of the forward pass.

        Raises:
            InputError: see `size`.
        """
        grid, width = self.size(resolution), 3
        found: list[BlockSpec] = []
        for stage in self.stages:
            for index in range(1 if stage.block == "stem" else stage.depth):
                halved = stage.downsample and index == 0
                after = (grid[0] // 2, grid[1] // 2) if halved else grid
                name = f"blocks.{stage.name}.{index}"
                found.append(BlockSpec(name, stage.name, stage.block, width, stage.width, halved, grid, after))
                grid, width = after, stage.width
        found.append(BlockSpec("blocks.head.0", "head", "head", width, width, False, grid, (1, 1)))
        return tuple(found)


def get(name: str) -> Spec:
    """The spec called `name`.

    Raises:
        InputError: no such model, with the closest names.
    """
    if name not in SPECS:
        raise unknown("model", name, SPECS)
    return SPECS[name]


def _stages(*sizes: tuple[int, int]) -> tuple[Stage, ...]:
    """S0..S4 from five pairs (depth, width): stem, MBConv twice, Transformer twice."""
    s0, s1, s2, s3, s4 = sizes
    return (
        Stage("s0", "stem", *s0),
        Stage("s1", "mbconv", *s1),
        Stage("s2", "mbconv", *s2),
        Stage("s3", "transformer", *s3),
        Stage("s4", "transformer", *s4),
    )


def _split_stages(*sizes: tuple[int, int]) -> tuple[Stage, ...]:
    """The same from six pairs: the third stage is MBConv, then Transformer blocks of another width (table 12)."""
    s0, s1, s2, s3a, s3b, s4 = sizes
    first = _stages(s0, s1, s2, s3b, s4)
    return (
        *first[:3],
        Stage("s3a", "mbconv", *s3a),
        Stage("s3b", "transformer", *s3b, downsample=False),
        first[4],
    )


def _printed(
    parameters: float,
    tables: tuple[int, ...],
    giga: dict[int, float],
    depthwise: dict[int, float] | None = None,
    core_days: int | None = None,
) -> Published:
    """A published row from multiply-adds in units of 1e9 by resolution, for the two placements of the stride."""
    rows: list[tuple[int, Stride, float]] = [(side, "expansion", count * 1e9) for side, count in giga.items()]
    rows += [(side, "depthwise", count * 1e9) for side, count in (depthwise or {}).items()]
    return Published(parameters, tuple(rows), core_days, tables)


_COATNET3 = Spec(
    "coatnet3",
    _stages((2, 192), (2, 192), (6, 384), (14, 768), (2, 1536)),
    head_size=32,
    published=_printed(168e6, (4, 5, 9), {224: 34.7, 384: 107.4, 512: 203.1}, {384: 114.0, 512: 214.0}),
)

_COATNET6 = Spec(
    "coatnet6",
    _split_stages((2, 192), (2, 192), (4, 384), (8, 768), (42, 1536), (2, 3072)),
    head_size=128,
    published=_printed(1.47e9, (5, 12), {512: 1521.0}, core_days=6_600),
)

_ALL = (
    Spec(
        "coatnet0",
        _stages((2, 64), (2, 96), (3, 192), (5, 384), (2, 768)),
        head_size=32,
        published=_printed(25e6, (4,), {224: 4.2, 384: 13.4}),
    ),
    Spec(
        "coatnet1",
        _stages((2, 64), (2, 96), (6, 192), (14, 384), (2, 768)),
        head_size=32,
        published=_printed(42e6, (4,), {224: 8.4, 384: 27.4}),
    ),
    Spec(
        "coatnet2",
        _stages((2, 128), (2, 128), (6, 256), (14, 512), (2, 1024)),
        head_size=32,
        published=_printed(75e6, (4,), {224: 15.7, 384: 49.8, 512: 96.7}),
    ),
    _COATNET3,
    Spec(
        "coatnet4",
        _stages((2, 192), (2, 192), (12, 384), (28, 768), (2, 1536)),
        head_size=32,
        published=_printed(275e6, (4, 5), {384: 189.5, 512: 360.9}, core_days=950),
    ),
    Spec(
        "coatnet5",
        _stages((2, 192), (2, 256), (12, 512), (28, 1280), (2, 2048)),
        head_size=64,
        published=_printed(688e6, (5, 12), {512: 812.0}, core_days=1_820),
    ),
    _COATNET6,
    Spec(
        "coatnet7",
        _split_stages((2, 192), (2, 256), (4, 512), (8, 1024), (42, 2048), (2, 3072)),
        head_size=128,
        published=_printed(2.44e9, (5, 12), {512: 2586.0}, core_days=20_100),
    ),
    # Table 5's CoAtNet-3, pre-trained on JFT: stride 2 in the depthwise convolution (table 9).
    replace(
        _COATNET3, name="coatnet3-dagger", stride="depthwise", published=replace(_COATNET3.published, core_days=580)
    ),
    # Table 12 prints D = 2048 for S4. That gives 1.348e9 parameters and 1465e9 multiply-adds at 512, against the
    # published 1.47e9 and 1521e9; D = 3072 is the only single change that fits both, so `coatnet6` has it. The
    # published row is not repeated here because it does not describe this network.
    replace(
        _COATNET6,
        name="coatnet6-table12",
        stages=(*_COATNET6.stages[:-1], replace(_COATNET6.stages[-1], width=2048)),
        published=Published(),
    ),
    # Not of the paper: all five stages in about 0.3M parameters, for pictures of 64 px on a CPU. Its layers are so
    # narrow that kernels of 0.02 would shrink the signal below the norms' eps on its way through the shortcuts.
    Spec("coatnet-nano", _stages((2, 16), (1, 16), (2, 32), (3, 64), (1, 96)), head_size=16, kernel_std=0.15),
)

SPECS: dict[str, Spec] = {spec.name: spec for spec in _ALL}
