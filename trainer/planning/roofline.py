"""Seconds of a network's blocks on a device: each operation takes as long as its arithmetic or its bytes. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from functools import lru_cache

from configs.schema import Run
from models import spec
from models.activations import Device as Kind
from models.operations import BlockTraffic, Operation, Style
from models.traffic import traffic
from trainer.planning.rates import MATH, Rates

FORWARD, BACKWARD = 0, 1


@dataclass(frozen=True)
class Seconds:
    """Of one block, or of several, for one pass of a micro-batch.

    Attributes:
        forward, backward: of a pass that keeps everything.
        selective, full: more for what a block's backward pass then makes again.
        calls: kernels of the two passes.
        forward_calls, selective_calls, full_calls: kernels of the forward pass, and of what is made again.
    """

    forward: float
    backward: float
    selective: float
    full: float
    calls: float
    forward_calls: float = 0.0
    selective_calls: float = 0.0
    full_calls: float = 0.0

    def again(self, recompute: str) -> float:
        """What `parallel.recompute` adds to the backward pass."""
        return {"none": 0.0, "selective": self.selective, "full": self.full}[recompute]

    def calls_again(self, recompute: str) -> float:
        """Kernels of that."""
        return {"none": 0.0, "selective": self.selective_calls, "full": self.full_calls}[recompute]


def of_operation(operation: Operation, rates: Rates, batch: int, way: int) -> float:
    """Seconds of an operation for a pass of `batch` pictures, forward (0) or backward (1)."""
    speed = rates.backward if way else rates.forward
    moved = batch * operation.moved[way] + operation.fixed[way]
    calls = operation.calls[way] * rates.call
    if operation.work in MATH:
        return max(batch * operation.flops[way] / speed[operation.work], moved / speed["elementwise"]) + calls
    return moved / speed[operation.work] + calls


def of_block(block: BlockTraffic, rates: Rates, batch: int) -> Seconds:
    """Seconds of a block.

    A block that is made again as a whole stops before its last map, whose input is the last that is wanted
    (`trainer.engine.recompute`).
    """
    forward = [of_operation(operation, rates, batch, FORWARD) for operation in block.operations]
    backward = [of_operation(operation, rates, batch, BACKWARD) for operation in block.operations]
    again = sum(cost for cost, operation in zip(forward, block.operations, strict=True) if operation.again)
    last = max(number for number, operation in enumerate(block.operations) if operation.work in MATH)
    calls = [operation.calls[FORWARD] for operation in block.operations]
    return Seconds(
        sum(forward), sum(backward), again, sum(forward[:last]),
        calls=sum(sum(operation.calls) for operation in block.operations), forward_calls=sum(calls),
        selective_calls=sum(operation.calls[FORWARD] for operation in block.operations if operation.again),
        full_calls=sum(calls[:last]),
    )  # fmt: skip


class Pace:
    """Seconds of any part of a run's network, on devices with these rates.

    Attributes:
        rates: by style.
    """

    def __init__(self, run: Run, classes: int, kind: Kind, rates: Mapping[Style, Rates]) -> None:
        self.run, self.classes, self.kind, self.rates = run, classes, kind, rates
        self._sums = lru_cache(maxsize=None)(self._upto)

    def of(self, first: int, last: int, micro_batch: int, style: Style) -> Seconds:
        """Of the blocks [first, last) of the flat list, for a micro-batch of so many samples."""
        sums = self._sums(micro_batch, style)
        return Seconds(*(after - before for before, after in zip(sums[first], sums[last], strict=True)))

    def operations(self, style: Style) -> tuple[BlockTraffic, ...]:
        """The operations of every block."""
        model = self.run.model
        return traffic(
            spec.of(model), model.resolution, style=style, dtype=self.run.precision.dtype, attention=model.attention,
            device=self.kind, classes=self.classes, drops=model.drop_path > 0,
        )  # fmt: skip

    def _upto(self, micro_batch: int, style: Style) -> list[tuple[float, ...]]:
        """The sums of `Seconds` over the blocks before each block."""
        known: dict[tuple[Operation, ...], tuple[float, ...]] = {}  # equal blocks take equally long
        sums = [(0.0,) * len(fields(Seconds))]
        for block in self.operations(style):
            if block.operations not in known:
                known[block.operations] = astuple(of_block(block, self.rates[style], micro_batch))
            sums.append(tuple(map(sum, zip(sums[-1], known[block.operations], strict=True))))
        return sums


def total(found: Iterable[Seconds]) -> Seconds:
    """The sum over blocks."""
    parts = list(found)
    return Seconds(*(sum(getattr(part, name) for part in parts) for name in Seconds.__dataclass_fields__))
