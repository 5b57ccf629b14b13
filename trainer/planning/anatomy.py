"""A run's network as a planner sees it: what each stage of a pipeline holds and sends. No torch.

All figures come from `models.cost` and `models.activations`. They are kept as sums over the blocks
before each block, so that a stage of any layout is a difference of two.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from configs.schema import Run
from models import cost, spec
from models.activations import BlockBytes, Device, Recompute
from trainer.engine.deepspeed_config import Weights
from trainer.plan import Layout
from trainer.stages import partition

LOSS = 8  # bytes that the loss keeps of a picture and class: the target, and what it takes the logarithm of
Groups = tuple[Any, Any]  # of the optimizer: with and without weight decay, rows of (elements, in bf16 under autocast)


@dataclass(frozen=True)
class Bytes:
    """Activations of one micro-batch in one stage.

    Attributes:
        saved: between its forward and its backward pass.
        inside: on top while the block that needs most is made again.
        entering: its input, as a stage that is made again keeps it.
        to_next, to_previous: what it sends; 0 where there is no such stage.
    """

    saved: int
    inside: int
    entering: int
    to_next: int
    to_previous: int


class Anatomy:
    """One run's network on one kind of device.

    Attributes:
        run: as the recipe has it; of its layout only what the questions do not name matters.
        kind: "cpu" or "cuda".
    """

    def __init__(self, run: Run, classes: int, kind: Device) -> None:
        self.run, self.classes, self.kind = run, classes, kind
        self.blocks = cost.count(spec.of(run.model), run.model.resolution, classes=classes).blocks
        self.bytes = lru_cache(maxsize=None)(self._bytes)
        self.groups = lru_cache(maxsize=None)(self._groups)
        self.reaching = lru_cache(maxsize=None)(self._reaching)
        self.apart = lru_cache(maxsize=None)(self._apart)

    @cached_property
    def _elements(self) -> list[int]:
        return [0, *accumulate(block.parameters for block in self.blocks)]

    @cached_property
    def _tensors(self) -> list[int]:
        return [0, *accumulate(len(block.weights) for block in self.blocks)]

    @cached_property
    def _norms(self) -> list[tuple[int, int]]:
        """(layers, channels) of BatchNorm before each block."""
        found = [(0, 0)]
        for block in self.blocks:
            widths = [weight.elements for weight in block.weights if weight.kind == "batch_norm"]
            found.append((found[-1][0] + len(widths) // 2, found[-1][1] + sum(widths) // 2))
        return found

    def elements(self, first: int, last: int) -> int:
        """Weights of the blocks [first, last)."""
        return self._elements[last] - self._elements[first]

    def tensors(self, first: int, last: int) -> int:
        """How many tensors those are."""
        return self._tensors[last] - self._tensors[first]

    def norms(self, first: int, last: int) -> tuple[int, int]:
        """(layers, channels) of BatchNorm in the blocks [first, last)."""
        (layers, channels), (more, wider) = self._norms[first], self._norms[last]
        return more - layers, wider - channels

    def weights(self, first: int, last: int) -> Weights:
        """The sizes of the blocks [first, last) as DeepSpeed's configuration wants them."""
        return Weights(self.elements(first, last), max(block.largest for block in self.blocks[first:last]))

    def largest_block(self, first: int, last: int) -> int:
        """Weights of the largest of the blocks [first, last)."""
        return max(block.parameters for block in self.blocks[first:last])

    def _groups(self, first: int, last: int) -> Groups:
        """The weights of the blocks [first, last) as `trainer.engine.optim.parameter_groups` has them."""
        weights = [weight for block in self.blocks[first:last] for weight in block.weights]
        with_decay, without = (
            np.array([(one.elements, one.kind == "map") for one in weights if one.decays == decays], dtype=np.int64)
            for decays in (True, False)
        )
        return with_decay.reshape(-1, 2), without.reshape(-1, 2)

    def _reaching(self, first: int, last: int, replicas: int) -> int:
        """Elements of all weights that reach into a rank's piece under ZeRO-1/2, of the rank with the most.

        DeepSpeed lays the weights of a group end to end and cuts that line into pieces of an even number of elements.
        """
        every = np.zeros(replicas, dtype=np.int64)
        for group in self.groups(first, last):
            if not len(group):
                continue
            ends = np.cumsum(group[:, 0])
            piece = -(-int(ends[-1]) // (2 * replicas)) * 2
            begin = np.minimum(np.arange(replicas) * piece, ends[-1])
            low = np.searchsorted(ends, begin, side="right")
            high = np.searchsorted(ends, np.minimum(begin + piece, ends[-1]), side="left")
            upto = np.concatenate([[0], ends])
            every += np.where(
                begin < ends[-1], upto[np.minimum(high + 1, len(ends))] - upto[np.minimum(low, len(ends))], 0
            )
        return int(every.max())

    def _apart(self, first: int, last: int, recompute: Recompute, micro_batch: int, each: float) -> int:
        """Bytes of gradients and activations of one micro-batch that are never there together.

        Args:
            each: bytes that a rank keeps of the gradient of a weight.
        """
        blocks = self._kept(recompute, micro_batch)[first:last]
        saved = sum(block.saved for block in blocks)
        inside = max(block.inside for block in blocks)
        there, peak = float(saved), float(saved + inside)
        for block, counted in zip(reversed(blocks), reversed(self.blocks[first:last]), strict=True):
            peak = max(peak, there + block.inside)
            there += each * counted.parameters - block.saved
            peak = max(peak, there)
        return int(saved + inside + each * self.elements(first, last) - peak)

    def inside(self, run: Run, plan: Layout, stage: int) -> int:
        """Bytes on top while the block of a stage that needs most is made again."""
        ends = partition.ends(run, self.classes, plan.micro_batch)
        first = ends[stage - 1] if stage else 0
        return self.bytes(first, ends[stage], partition.inside(run), plan.micro_batch).inside

    def largest_saved(self, first: int, last: int, micro_batch: int) -> int:
        """Activations of the block of [first, last) that has most, nothing made again."""
        return max(block.saved for block in self._kept("none", micro_batch)[first:last])

    def _bytes(self, first: int, last: int, recompute: Recompute, micro_batch: int) -> Bytes:
        """Of the blocks [first, last) as a stage, for a micro-batch of so many samples."""
        kept = self._kept(recompute, micro_batch)
        blocks = kept[first:last]
        saved = sum(block.saved for block in blocks)
        entering = self._kept("full", micro_batch)[first].saved
        if first == 0 and self.run.precision.dtype == "bf16" and recompute != "full":
            saved += entering  # the pictures, of which the stem keeps a copy in bf16
        if last == len(kept):
            saved += LOSS * micro_batch * self.classes
        return Bytes(
            saved=saved,
            inside=max(block.inside for block in blocks),
            entering=entering,
            to_next=micro_batch * kept[last - 1].boundary if last < len(kept) else 0,
            to_previous=micro_batch * kept[first - 1].boundary if first else 0,
        )

    def _kept(self, recompute: Recompute, micro_batch: int) -> tuple[BlockBytes, ...]:
        return partition.block_bytes(self.run, self.classes, micro_batch, recompute, self.kind)
