"""Bytes that a rank puts on the wire for one optimizer step: formulas of what DeepSpeed 0.19 and our code do. No torch.

Two figures each. Payload: the whole tensor that a collective is about, as `trainer/stages/trace.py` counts it: the
input of a reduce_scatter or all_reduce, the output of an all_gather. Sent: the payload times what a ring of n ranks
makes of it, 2 (n - 1) / n for an all_reduce, (n - 1) / n for an all_gather or reduce_scatter, 1 for a transfer. Single
numbers (the norm, the loss, checks of order) are left out.

Where DeepSpeed sends more than the textbook:

- ZeRO-0 sums the gradients in fp32 under bf16 autocast too. ZeRO-1 to 3 send those of convolutions and linear maps in
  bf16, the others in fp32.
- ZeRO-1/2 all_reduce whole buckets (`use_multi_rank_bucket_allreduce`) where a reduction to each piece's owner would
  do: twice the bytes. The new weights are gathered in fp32.
- ZeRO-2/3 reduce the gradients of every micro-batch, because no rank keeps a whole one.
- ZeRO-3 gathers the large weights again for every micro-batch. A small weight (`threshold` elements or fewer) stays
  whole and is gathered once, after the update, in fp32.
- With a shard group a large weight is gathered from all replicas once in a step, and from then on from the ranks of the
  group, which have it in pieces.
- A ZeRO-3 stage that makes its forward pass again gathers each large weight three times per micro-batch: for each
  forward pass and for the backward pass. DeepSpeed remembers from the first recorded pass, which had no backward pass,
  that a weight can be let go. With a single micro-batch it never records a whole one and gathers the small weights
  once more.
- A BatchNorm group over a team of ranks gathers its statistics in every forward pass, also in one that is made again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.stages.trace import Operation, Program

SCALARS = 16  # bytes up to which an operation is not counted
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # times (n - 1) / n
FLOAT, HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Share:
    """One rank's part in a run, as far as it matters here.

    Attributes:
        groups: the weights of its stage by the optimizer's group, as rows: elements, and 1 if autocast takes them as
            bf16 (those of convolutions and linear maps), else 0.
        channels: of all BatchNorm layers of its stage together.
        team: ranks that share a BatchNorm group.
        to_next, to_previous: bytes of the activation that goes to the next stage, and of the gradient that goes back,
            of one micro-batch; 0 where there is no such stage.
        threshold: ZeRO-3's largest weight that stays whole, in elements.
        reuse: ZeRO-3 keeps a weight that it needs again before so many elements of others.
        shard: ranks that have a copy of the weights in pieces among them (`parallel.shard_group`); 0: none.
    """

    zero: int
    dtype: str
    recompute: str
    accumulation: int
    replicas: int
    stages: int
    stage: int
    groups: Sequence[Any]
    channels: int
    team: int
    to_next: int
    to_previous: int
    threshold: int
    reuse: int
    shard: int = 0

    @property
    def remakes(self) -> bool:
        """Whether this stage makes its forward pass again as a whole."""
        return self.zero >= 2 and self.stage < self.stages - 1

    @property
    def forwards(self) -> int:
        """Passes forward through a BatchNorm layer for one micro-batch."""
        by_stage = self.zero >= 2 and self.stages > 1
        by_block = self.recompute == "selective" or (self.recompute == "full" and not by_stage)
        return 1 + self.remakes + by_block


@dataclass(frozen=True)
class Traffic:
    """What one rank does for one purpose in one optimizer step.

    Attributes:
        ranks: of the process group.
        payload: bytes of the whole tensors.
    """

    purpose: str
    kind: str
    ranks: int
    payload: int

    @property
    def sent(self) -> int:
        """Bytes that leave this rank."""
        if self.kind == "send":
            return self.payload
        return round(self.payload * RING[self.kind] * (self.ranks - 1) / self.ranks)


def of_step(share: Share) -> list[Traffic]:
    """What `share` does in an optimizer step, once DeepSpeed has seen the order of modules (from the third step on)."""
    found = [*_weights(share), *_statistics(share)]
    for purpose, size in (("activations", share.to_next), ("their gradients", share.to_previous)):
        found.append(Traffic(purpose, "send", 2, share.accumulation * size))
    return [traffic for traffic in found if traffic.payload and traffic.ranks > 1]


def _weights(share: Share) -> Iterator[Traffic]:
    """Gradients and weights, over the replicas of a stage."""
    n, times = share.replicas, share.accumulation
    groups = [np.asarray(group, dtype=np.int64).reshape(-1, 2) for group in share.groups]
    elements, mapped = np.concatenate(groups).T
    size = np.where(mapped == 1, HALF, FLOAT) if share.dtype == "bf16" else np.full(len(elements), FLOAT)
    if share.zero == 0:
        yield Traffic("gradients", "all_reduce", n, int(elements.sum()) * FLOAT)
    elif share.zero in (1, 2):
        gradients = int((elements * size).sum())
        yield Traffic("gradients", "all_reduce", n, gradients * (times if share.zero == 2 else 1))
        whole = sum(-(-int(group[:, 0].sum()) // (2 * n)) * 2 * n for group in groups)
        yield Traffic("new weights", "all_gather", n, whole * FLOAT)
    else:
        cut = -(-elements // n) * n
        small = cut <= share.threshold
        large = int((cut * size)[~small].sum())
        yield Traffic("gradients", "reduce_scatter", n, int((cut * size).sum()) * times)
        gathered = round(large * times * _gathers(share, int(elements.sum())))
        whole = min(large, gathered) if share.shard else gathered
        yield Traffic("large weights", "all_gather", n, whole)
        yield Traffic("large weights, in a shard group", "all_gather", share.shard, gathered - whole)
        yield Traffic("small weights", "all_gather", n, int(cut[small].sum()) * FLOAT)
        if share.remakes and times == 1:
            yield Traffic("small weights again", "all_gather", n, int((cut * size)[small].sum()))


def _gathers(share: Share, elements: int) -> float:
    """How often ZeRO-3 gathers a large weight for one micro-batch, on the average; `elements` of the stage.

    Behind a weight's use in the forward pass lie the later weights twice (forward and backward) until its next one,
    three times where blocks are computed again. Within `reuse` it is kept, beyond it is gathered again. A block that is
    computed again has its weights kept from then to its backward pass, but where nothing is kept at all.
    """
    if share.remakes:
        return 3.0
    between = elements * (2 if share.recompute == "none" or share.stages > 1 else 3)
    again = share.recompute == "full" and share.stages == 1 and share.reuse == 0
    return 2.0 - min(1.0, share.reuse / max(1, between)) + again


def _statistics(share: Share) -> Iterator[Traffic]:
    """BatchNorm's, once per step over the replicas and in every pass over a team."""
    moments = 2 * share.channels * FLOAT
    if share.channels:
        yield Traffic("running statistics", "all_reduce", share.replicas, moments + FLOAT)
    if share.team > 1:
        passes = share.accumulation * share.forwards
        yield Traffic("BatchNorm, forward", "all_gather", share.team, share.team * moments * passes)
        yield Traffic("BatchNorm, backward", "all_reduce", share.team, moments * share.accumulation)


def expected(share: Share) -> dict[str, int]:
    """Payload of a step in bytes by kind of operation, from the formulas."""
    return _by_kind((traffic.kind, traffic.payload) for traffic in of_step(share))


def counted(program: Program, control: str) -> dict[str, int]:
    """Payload in bytes by kind of operation, from a recorded step.

    Args:
        control: name of the process group for flags and reports, which is left out.
    """
    return _by_kind(
        (operation.kind, operation.bytes) for node in program for operation in node if _counts(operation, control)
    )


def _counts(operation: Operation, control: str) -> bool:
    """Whether an operation puts something on the wire here: the sender counts a transfer."""
    here = operation.group != control and len(operation.ranks) > 1 and operation.kind != "receive"
    return here and operation.bytes > SCALARS


def _by_kind(pairs: Iterator[tuple[str, int]]) -> dict[str, int]:
    """Sums by kind, in the order of the kinds' names."""
    sums: dict[str, int] = {}
    for kind, size in pairs:
        sums[kind] = sums.get(kind, 0) + size
    return dict(sorted(sums.items()))
