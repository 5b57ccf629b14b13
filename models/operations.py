"""What an operation of a block is, for a roofline: kinds of work, arithmetic, bytes, kernels. No torch."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Style = Literal["eager", "compiled", "bound"]
STYLES: tuple[Style, ...] = ("eager", "compiled", "bound")
Work = Literal["matrix", "window", "product", "depthwise", "norm", "gelu", "softmax", "elementwise", "weights"]
# matrix: linear maps and 1x1 convolutions; window: the stem's convolutions; product: queries x keys, weights x values;
# weights: autocast's copies of weights and of their gradients.
WORKS: tuple[Work, ...] = (
    "matrix", "window", "product", "depthwise", "norm", "gelu", "softmax", "elementwise", "weights",
)  # fmt: skip
Both = tuple[float, float]  # forward, backward


class Operation(NamedTuple):
    """One operation of a block.

    Attributes:
        flops: two for each multiply-add, of one picture.
        moved: bytes of activations and their gradients, of one picture.
        fixed: bytes of weights and their gradients, of one pass whatever its batch.
        calls: kernels.
        again: selective recomputation makes it again.
    """

    name: str
    work: Work
    flops: Both = (0.0, 0.0)
    moved: Both = (0.0, 0.0)
    fixed: Both = (0.0, 0.0)
    calls: Both = (1, 1)
    again: bool = False


@dataclass(frozen=True)
class BlockTraffic:
    """One block of the flat list, under the network's own name for it; its operations in the order of the pass."""

    name: str
    stage: str
    operations: tuple[Operation, ...]

    @property
    def moved(self) -> float:
        """Bytes of one picture, forward and backward."""
        return sum(sum(operation.moved) for operation in self.operations)
