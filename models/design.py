"""A network as data: stages, blocks at a resolution, design choices. No torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from configs.errors import InputError

Stride = Literal["expansion", "depthwise"]
RelativeBias = Literal["pre", "post", "none"]
ConvNorm = Literal["batch", "layer"]
Kind = Literal["stem", "patches", "mbconv", "transformer", "head"]
Resolution = int | tuple[int, int]  # pixels: a square, or (height, width)

# Residual branches of a block, which stochastic depth drops.
SUB_LAYERS: dict[Kind, int] = {"stem": 0, "patches": 0, "mbconv": 1, "transformer": 2, "head": 0}


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind and width.

    Attributes:
        name: "s0" .. "s4"; "s3a" and "s3b" where the third stage has two kinds of blocks.
        block: "stem" is CoAtNet's two convolutions, "patches" a ViT's one.
        depth: blocks; of the stem, its convolutions, which form one block.
        width: channels.
        stride: of the first block, which divides height and width by it.
    """

    name: str
    block: Literal["stem", "patches", "mbconv", "transformer"]
    depth: int
    width: int
    stride: int = 2


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
        stride: by which it divides height and width; 1 keeps them.
        grid_in, grid: (height, width) of the feature map before and after.
    """

    name: str
    stage: str
    kind: Kind
    width_in: int
    width: int
    stride: int
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
        relative_bias: the learned value of the offset between query and key is added before the softmax ("pre"), to
            the weights after it ("post"), or there is none (section 2.1 and table 6 of the paper).
        conv_norm: the norm in MBConv blocks (table 8); the stem keeps BatchNorm.
    """

    name: str
    stages: tuple[Stage, ...]
    head_size: int
    expansion: int = 4
    se_ratio: float = 0.25
    kernel: int = 3
    stride: Stride = "expansion"
    kernel_std: float = 0.02
    relative_bias: RelativeBias = "pre"
    conv_norm: ConvNorm = "batch"
    published: Published = field(default_factory=Published)

    @property
    def total_stride(self) -> int:
        """Pixels of the picture to a side of one position of the last feature map."""
        return math.prod(stage.stride for stage in self.stages)

    def size(self, resolution: Resolution) -> tuple[int, int]:
        """(height, width) in pixels.

        Raises:
            InputError: a side is not a positive multiple of the network's total stride.
        """
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        total = self.total_stride
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
            for index in range(1 if stage.block in ("stem", "patches") else stage.depth):
                step = stage.stride if index == 0 else 1
                after = (grid[0] // step, grid[1] // step)
                name = f"blocks.{stage.name}.{index}"
                found.append(BlockSpec(name, stage.name, stage.block, width, stage.width, step, grid, after))
                grid, width = after, stage.width
        found.append(BlockSpec("blocks.head.0", "head", "head", width, width, 1, grid, (1, 1)))
        return tuple(found)
