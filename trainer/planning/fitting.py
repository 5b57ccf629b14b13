"""Rates of a device from measured training steps: the least relative errors with no rate below zero. No torch.

Blocks:  seconds = sum over kinds of work of amount / rate + kernels x call
         where an operation's arithmetic and its bytes compete, the longer one at the rates so far counts; four rounds
Steps:   thread's seconds beside its blocks = AdamW's bytes and copies at the rate `update`, and `hooks` for each weight
         and micro-batch; what it waits for = bytes on the wire / `wire` + collectives x `latency`

What cannot be told apart from the runs that were made is held near a first guess (`PULL`): a rate that fits them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.operations import WORKS, BlockTraffic, Work
from trainer.planning.rates import MATH, Rates
from trainer.planning.roofline import of_operation
from trainer.planning.step_time import ADAMW, AVERAGE, CLIP, StageWork, Terms, operations_of
from trainer.stages.wire import of_step

PULL = 0.03  # of a first guess, beside measurements of weight 1
ROUNDS = 4
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Timed:
    """One block of one run.

    Attributes:
        block: its operations.
        batch: samples of a pass.
        seconds: forward and backward, of one micro-batch.
    """

    block: BlockTraffic
    batch: int
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Stepped:
    """One rank of one run without a pipeline.

    Attributes:
        work: its stage.
        terms: its layout.
        busy: seconds of a step in which its thread had a core.
        waits: seconds in which it waited for other ranks.
    """

    work: StageWork
    terms: Terms
    busy: float
    waits: float


def non_negative(matrix: Floats, wanted: Floats, guess: Floats) -> Floats:
    """The x >= 0 with the least |matrix x - wanted|^2 + PULL^2 sum of |column|^2 (x - guess)^2; by coordinates.

    Where `guess` is 0 nothing pulls.
    """
    pull = np.where(guess > 0, PULL * np.linalg.norm(matrix, axis=0), 0.0)
    gram, right, x = matrix.T @ matrix + np.diag(pull**2), matrix.T @ wanted + pull**2 * guess, guess.copy()
    for _ in range(20_000):
        before = x.copy()
        for place in range(len(x)):
            if gram[place, place] > 0:
                x[place] = max(0.0, x[place] - (gram[place] @ x - right[place]) / gram[place, place])
        if np.allclose(x, before, rtol=1e-9, atol=0):
            break
    return x


def kernels(timed: Sequence[Timed], start: Rates) -> Rates:
    """The rates of the kinds of work, and of a kernel that does nothing."""
    found = start
    for _ in range(ROUNDS):
        ways: dict[str, Any] = {}
        calls = []
        for way, name in enumerate(("forward", "backward")):
            inverse = _inverse(timed, found, way)
            ways[name] = {work: 1 / max(float(value), 1e-18) for work, value in zip(WORKS, inverse, strict=False)}
            calls.append(inverse[-1])
        found = replace(found, **ways, call=float(np.mean(calls)))
    return replace(found, share=1.0, measured=tuple({*start.measured, "forward", "backward"}))


def _inverse(timed: Sequence[Timed], rates: Rates, way: int) -> Floats:
    """Seconds for one unit of each kind of work, and for one kernel."""
    matrix = np.array([_amounts(one, rates, way) / one.seconds[way] for one in timed])
    speed = rates.backward if way else rates.forward
    now = np.array([*(1 / speed[work] for work in WORKS), rates.call])
    # The first guess: today's rates, all faster or slower alike, so that they fit best.
    fits = matrix @ now
    guess = now * float(fits.sum() / (fits @ fits))
    return non_negative(matrix, np.ones(len(timed)), guess)


def _amounts(one: Timed, rates: Rates, way: int) -> Floats:
    """FLOPs, bytes and kernels of a block's pass by kind, each operation under what it takes longer for."""
    found: dict[str, float] = dict.fromkeys([*WORKS, "call"], 0.0)
    bare = replace(rates, call=0.0)
    for operation in one.block.operations:
        kind: Work = operation.work
        amount = one.batch * operation.moved[way] + operation.fixed[way]
        if kind in MATH:
            flops = one.batch * operation.flops[way]
            speed = (rates.backward if way else rates.forward)[kind]
            in_math = of_operation(operation, bare, one.batch, way) <= flops / speed * (1 + 1e-9)
            kind, amount = (kind, flops) if in_math else ("elementwise", amount)
        found[kind] += amount
        found["call"] += operation.calls[way]
    return np.array(list(found.values()))


def steps(stepped: Sequence[Stepped], kernels_of: Mapping[int, float], start: Rates) -> Rates:
    """The rates of what lies between the blocks.

    Args:
        kernels_of: by the number of a run, seconds of its blocks in a step at the fitted rates.
    """
    names = ["update", *(f"{name}{zero}" for name in ("hooks", "copies", "settling") for zero in range(4))]
    place = {name: number for number, name in enumerate(names)}
    matrix, wanted = np.zeros((len(stepped), len(names))), np.zeros(len(stepped))
    for row, one in enumerate(stepped):
        share, zero = one.work.share, one.work.share.zero
        own = one.work.elements / (share.replicas if zero else 1)
        matrix[row, 0] = own * (ADAMW + CLIP + (AVERAGE if one.terms.ema else 0))
        matrix[row, place[f"hooks{zero}"]] = one.work.tensors * share.accumulation
        matrix[row, place[f"copies{zero}"]] = one.work.elements * share.accumulation
        matrix[row, place[f"settling{zero}"]] = one.work.elements
        wanted[row] = one.busy - kernels_of[row]
    weight = 1 / np.array([one.busy for one in stepped])
    byte = 1 / start.backward["weights"]  # AdamW moves about as they do; copies too
    guess = np.array([byte, *start.hooks, *(byte * moved for moved in (*start.copies, *start.settling))])
    x = non_negative(matrix * weight[:, None], wanted * weight, guess).tolist()
    byte = max(x[0], 1e-15)
    found = replace(
        start, update=1 / byte, hooks=tuple(x[1:5]), copies=tuple(value / byte for value in x[5:9]),
        settling=tuple(value / byte for value in x[9:]),
        measured=tuple({*start.measured, "update", "hooks", "copies", "settling"}),
    )  # fmt: skip
    if all(one.work.share.replicas == 1 for one in stepped):  # nobody sent anything
        return found
    wire, latency = _wire(stepped, start)
    return replace(found, wire=wire, latency=latency, measured=(*found.measured, "wire"))


def _wire(stepped: Sequence[Stepped], start: Rates) -> tuple[float, float]:
    """Bytes/s between the ranks of this machine, and seconds of a collective beside them."""
    sent = [sum(traffic.sent for traffic in of_step(one.work.share)) for one in stepped]
    times = [sum(operations_of(traffic, one.work, one.terms) for traffic in of_step(one.work.share)) for one in stepped]
    waits = np.array([one.waits for one in stepped])
    weight = 1 / np.array([one.busy + one.waits for one in stepped])
    matrix = np.array([sent, times], dtype=np.float64).T
    x = non_negative(matrix * weight[:, None], waits * weight, np.array([1 / start.wire, start.latency]))
    return 1 / max(float(x[0]), 1e-18), float(x[1])
