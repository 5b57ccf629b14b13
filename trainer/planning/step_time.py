"""Seconds of an optimizer step of a layout: compute, what is made again, bubble, traffic, update. No torch.

    micro-batch of a stage   kernels of its blocks (`trainer.planning.roofline`) and of what is made again, and on a GPU
                             not less than the host takes to start them; transfers to its neighbours; ZeRO's traffic of
                             each micro-batch
    pipeline                 the stage s for which  m (f_s + b_s) + sum over earlier stages of (f + b)  is largest:
                             it waits for the first micro-batch to reach it and for the last gradient to leave it
    step                     that, the traffic at the end of the step, and AdamW

On a processor a stage that waits leaves its core's memory and caches to the others, which are faster for so long
(`Rates.alone`): of a pipeline on one machine that much is taken off.

Bytes on the wire are those of `trainer.stages.wire`, which tests hold against real ranks. Traffic is hidden behind the
backward pass of its micro-batch where DeepSpeed's configuration lets it be, up to `Rates.overlap` of that pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.planning.machines import Machines
from trainer.planning.rates import Rates
from trainer.planning.roofline import Seconds
from trainer.stages import wire
from trainer.stages.wire import Share, Traffic

ADAMW = 28  # bytes of AdamW for each element: weight, gradient and two moments read, all but the gradient written
AVERAGE = 12  # of the moving average
CLIP = 4  # of the gradient's norm
FLOAT = 4


@dataclass(frozen=True)
class StageWork:
    """What one stage does in a step.

    Attributes:
        seconds: of its blocks, for one micro-batch.
        share: its part in the traffic.
        blocks: of the stage.
        elements: weights of the stage.
        tensors: how many those are.
        norms: BatchNorm layers.
    """

    seconds: Seconds
    share: Share
    blocks: int
    elements: int
    tensors: int
    norms: int


@dataclass(frozen=True)
class Terms:
    """What of a layout matters beside its stages.

    Attributes:
        recompute: inside a pass that has gradients.
        overlap: whether the engine lets gradients travel while the backward pass goes on.
        bucket: elements that DeepSpeed reduces together.
        offload: where AdamW's state lies.
        ema: whether averages are kept.
    """

    recompute: str
    overlap: bool
    bucket: int
    offload: str
    ema: bool


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go to; they sum up to `total`.

    Attributes:
        compute: of the stage that decides, forward and backward, without what it makes again.
        again: made again there.
        bubble: that stage waits for the others.
        exposed: traffic that nothing hides.
        update: AdamW, the clip, moving states from and to the host.
        rest: what a sum of kernels leaves out (`Rates.share`).
        traffic: all of the traffic, hidden or not; not a part of the sum.
    """

    compute: float
    again: float
    bubble: float
    exposed: float
    update: float
    rest: float
    traffic: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.compute + self.again + self.bubble + self.exposed + self.update + self.rest


def of_layout(stages: Sequence[StageWork], terms: Terms, machines: Machines, rates: Rates) -> StepTime:
    """The step of a layout with these stages."""
    found = [_stage(stage, terms, machines, rates) for stage in stages]
    micros = stages[0].share.accumulation
    passed, worst = 0.0, (0.0, 0)
    for number, one in enumerate(found):
        worst = max(worst, (micros * one.micro + passed, number))
        passed += one.micro
    length, slowest = worst
    stage = found[slowest]
    quick = _quicker(found, micros, length, rates) if machines.devices <= machines.per_node else 1.0
    update = max(_update(one, terms, rates) for one in stages)
    end = max(one.end for one in found)
    kernels = length - micros * stage.exposed
    return StepTime(
        compute=micros * stage.compute * quick,
        again=micros * stage.again * quick,
        bubble=(length - micros * stage.micro) * quick,
        exposed=micros * stage.exposed * quick + end,
        update=update,
        rest=quick * kernels * (1 / rates.share - 1),
        traffic=micros * stage.traffic,
    )


def _quicker(stages: Sequence["_Stage"], micros: int, length: float, rates: Rates) -> float:
    """The share of a pipeline's `length` that is left, since a rank is quicker while others wait for it."""
    if len(stages) == 1:
        return 1.0
    waiting = sum(length - micros * one.micro for one in stages) / (len(stages) - 1)
    return 1 - min(1.0, waiting / length) * (1 - 1 / rates.alone)


@dataclass(frozen=True)
class _Stage:
    """Seconds of one stage: of a micro-batch, `traffic` all of it, and `end` what is exposed at the end of the step."""

    compute: float
    again: float
    exposed: float
    traffic: float
    end: float

    @property
    def micro(self) -> float:
        return self.compute + self.again + self.exposed


def _stage(work: StageWork, terms: Terms, machines: Machines, rates: Rates) -> _Stage:
    """The seconds of one stage."""
    share, seconds = work.share, work.seconds
    again = seconds.again(terms.recompute) + (seconds.forward if share.remakes else 0.0)
    calls = seconds.calls + seconds.calls_again(terms.recompute) + (seconds.forward_calls if share.remakes else 0.0)
    zero = share.zero
    host = calls * rates.launch + work.tensors * rates.hooks[zero]
    compute = seconds.forward + seconds.backward + work.elements * rates.copies[zero] / rates.update
    compute = compute + host if rates.launch == 0 else max(compute, host - again)
    each, gradients, end = 0.0, 0.0, 0.0
    for traffic in wire.of_step(share):
        taken = _seconds(traffic, work, terms, machines, rates)
        if _of_each_micro_batch(traffic, share):
            each += taken / share.accumulation
        elif traffic.purpose == "gradients":
            gradients += taken
        else:
            end += taken
    hidden = rates.overlap * seconds.backward if terms.overlap else 0.0
    exposed = max(0.0, each - hidden)
    left = max(0.0, gradients - hidden) if share.zero else gradients  # under ZeRO-0 they follow the last backward pass
    return _Stage(compute, again, exposed, each + (gradients + end) / share.accumulation, left + end)


def _of_each_micro_batch(traffic: Traffic, share: Share) -> bool:
    """Whether it is there in every micro-batch, and not once at the end of the step."""
    if traffic.purpose == "gradients":
        return share.zero >= 2
    return traffic.purpose not in ("new weights", "small weights", "small weights again", "running statistics")


def _seconds(traffic: Traffic, work: StageWork, terms: Terms, machines: Machines, rates: Rates) -> float:
    """Seconds of the traffic for one purpose in a step."""
    share, times = work.share, operations_of(traffic, work, terms)
    if traffic.kind == "send":
        return traffic.sent / machines.pipe(share.replicas, rates) + times * rates.latency
    bus, waits = machines.bus(traffic.ranks, rates), times * machines.latency(traffic.ranks, rates)
    return traffic.sent / bus + waits


def operations_of(traffic: Traffic, work: StageWork, terms: Terms) -> int:
    """Collectives, or transfers, of the traffic for one purpose in a step."""
    share, buckets = work.share, -(-work.elements // terms.bucket)
    if traffic.kind == "send":
        return share.accumulation
    if traffic.purpose == "BatchNorm, forward":
        return work.norms * share.forwards * share.accumulation
    if traffic.purpose == "BatchNorm, backward":
        return work.norms * share.accumulation
    if traffic.purpose.startswith("large weights"):
        # DeepSpeed fetches what lies ahead together, about a block at a time; with a group once from all replicas.
        passes = (2 if share.recompute == "none" else 3) * share.accumulation
        near = "group" in traffic.purpose
        return work.blocks * (passes - 1 if near else 1 if share.shard else passes)
    return buckets * (share.accumulation if traffic.purpose == "gradients" and share.zero >= 2 else 1)


def _update(work: StageWork, terms: Terms, rates: Rates) -> float:
    """AdamW, the norm for the clip, averages, and states that come from elsewhere and go back."""
    share = work.share
    own = work.elements / (share.replicas if share.zero else 1)
    each = ADAMW + CLIP + (AVERAGE if terms.ema else 0)
    taken = rates.step + (own * each + work.elements * rates.settling[share.zero]) / rates.update
    if terms.offload == "cpu":
        return taken + 2 * FLOAT * own / rates.host
    if terms.offload == "nvme":
        return taken + 2 * FLOAT * own / rates.host + 2 * 3 * FLOAT * own / rates.disk
    return taken
