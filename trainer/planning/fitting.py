"""Rates of a device from measured training steps: the least relative errors with no rate below zero. No torch.

Blocks:  seconds = sum over kinds of work of amount / rate + kernels x call
         where an operation's arithmetic and its bytes compete, the longer one at the rates so far counts; four rounds
Steps:   thread's seconds beside its blocks = AdamW's bytes and copies at the rate `update`, and `hooks` for each weight
         and micro-batch; what it waits for = bytes on the wire / `wire` + collectives x `latency`
Host:    on a GPU the blocks of a micro-batch take as long as their kernels, or as the host takes to start them:
         kernels x `launch` + weights x `hooks`; runs in which that is longer tell both

What cannot be told apart from the runs that were made is held near a first guess (`PULL`): a rate that fits them all.
No rate leaves what a device can do (`_limits`): runs in which an operation is a small part say nothing of its speed.
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
UNSURE = 10.0  # times as fast as assumed a processor's core may be
SLOWEST = 30.0  # times as slow as assumed any device may be
MATRIX_SHARE = 0.8  # of the data sheet's peak is what `rates.assumed` gives large products
CACHED = 1.5  # times the assumed bandwidth for what lies in a GPU's cache
IDLE_KERNEL = 5e-6  # seconds that a kernel without work keeps a GPU at most
MOVED = 300.0  # bytes that DeepSpeed moves for an element at most
HOST_DECIDES = 1.15  # times as long as its kernels: then the device waited
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


@dataclass(frozen=True)
class Started:
    """The blocks of one run on a GPU, forward and backward of one micro-batch.

    Attributes:
        kernels: seconds at the fitted rates.
        took: seconds measured.
        calls: kernels.
        tensors: weights.
    """

    zero: int
    kernels: float
    took: float
    calls: float
    tensors: int

    @property
    def host_decides(self) -> bool:
        """Whether the device waited for the host."""
        return self.took > HOST_DECIDES * self.kernels


def bounded(
    matrix: Floats, wanted: Floats, guess: Floats, least: Floats | float = 0.0, most: Floats | float = np.inf
) -> Floats:
    """The x with the least |matrix x - wanted|^2 + PULL^2 sum of |column|^2 (x - guess)^2; by coordinates.

    Where `guess` is 0 nothing pulls.

    Args:
        least, most: of each x.
    """
    pull = np.where(guess > 0, PULL * np.linalg.norm(matrix, axis=0), 0.0)
    gram, right = matrix.T @ matrix + np.diag(pull**2), matrix.T @ wanted + pull**2 * guess
    low, high = np.broadcast_to(least, guess.shape), np.broadcast_to(most, guess.shape)
    x = np.clip(guess, low, high)
    for _ in range(20_000):
        before = x.copy()
        for place in range(len(x)):
            if gram[place, place] > 0:
                free = x[place] - (gram[place] @ x - right[place]) / gram[place, place]
                x[place] = min(max(low[place], free), high[place])
        if np.allclose(x, before, rtol=1e-9, atol=0):
            break
    return x


def kernels(timed: Sequence[Timed], start: Rates) -> Rates:
    """The rates of the kinds of work, and of a kernel that does nothing.

    Args:
        start: assumed of the device.
    """
    found = start
    for _ in range(ROUNDS):
        ways: dict[str, Any] = {}
        calls = []
        for way, name in enumerate(("forward", "backward")):
            inverse = _inverse(timed, found, start, way)
            ways[name] = {work: 1 / float(value) for work, value in zip(WORKS, inverse, strict=False)}
            calls.append(inverse[-1])
        found = replace(found, **ways, call=float(np.mean(calls)))
    return replace(found, share=1.0, measured=tuple({*start.measured, "forward", "backward"}))


def _limits(start: Rates) -> tuple[Floats, Floats]:
    """The least and the most seconds for one unit of each kind of work, and for one kernel.

    A GPU's data sheet says the most that it can do, of a processor only an assumption is there.
    """
    sheet = start.launch > 0
    fastest = {
        work: start.forward["matrix"] / MATRIX_SHARE if work in MATH else CACHED * start.forward["elementwise"]
        for work in WORKS
    } if sheet else {work: UNSURE * speed for work, speed in start.forward.items()}  # fmt: skip
    least = [1 / fastest[work] for work in WORKS]
    most = [SLOWEST / start.forward[work] for work in WORKS]
    return np.array([*least, 0.0]), np.array([*most, IDLE_KERNEL if sheet else np.inf])


def _inverse(timed: Sequence[Timed], rates: Rates, start: Rates, way: int) -> Floats:
    """Seconds for one unit of each kind of work, and for one kernel."""
    matrix = np.array([_amounts(one, rates, way) / one.seconds[way] for one in timed])
    speed = rates.backward if way else rates.forward
    now = np.array([*(1 / speed[work] for work in WORKS), rates.call])
    # The first guess: today's rates, all faster or slower alike, so that they fit best.
    fits = matrix @ now
    guess = now * float(fits.sum() / (fits @ fits))
    return bounded(matrix, np.ones(len(timed)), guess, *_limits(start))


def host(started: Sequence[Started], start: Rates) -> Rates:
    """What a GPU's host takes to start a kernel, and DeepSpeed for a weight, from runs whose device waits for it.

    No run is shorter than its host, so the shortest tells. Where the device never waits, what was assumed stays if the
    runs leave room for it.
    """
    launch = _host_seconds(
        [(one, (one.took - one.tensors * start.hooks[0]) / one.calls) for one in started if one.zero == 0], start.launch
    )
    hooks = list(start.hooks)
    for zero in {one.zero for one in started} - {0}:
        each = [(one, (one.took - one.calls * launch) / one.tensors) for one in started if one.zero == zero]
        hooks[zero] = _host_seconds(each, start.hooks[zero])
    return replace(start, launch=launch, hooks=tuple(hooks), measured=tuple({*start.measured, "launch", "hooks"}))


def _host_seconds(each: Sequence[tuple[Started, float]], assumed: float) -> float:
    """Seconds for one kernel or weight, from the most that each run leaves for it."""
    most = max(0.0, min((seconds for _, seconds in each), default=assumed))
    return most if any(one.host_decides for one, _ in each) else min(assumed, most)


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
        kernels_of: by the number of a run, seconds of its blocks in a step at the fitted rates; on a GPU as measured,
            since what the hooks do is among them.
    """
    sheet = start.launch > 0
    names = ["update", "step", *(f"{name}{zero}" for name in ("hooks", "copies", "settling") for zero in range(4))]
    place = {name: number for number, name in enumerate(names)}
    matrix, wanted = np.zeros((len(stepped), len(names))), np.zeros(len(stepped))
    for row, one in enumerate(stepped):
        share, zero = one.work.share, one.work.share.zero
        own = one.work.elements / (share.replicas if zero else 1)
        matrix[row, 0] = own * (ADAMW + CLIP + (AVERAGE if one.terms.ema else 0))
        if sheet:
            matrix[row, place["step"]] = 1.0
        else:
            matrix[row, place[f"hooks{zero}"]] = one.work.tensors * share.accumulation
            matrix[row, place[f"copies{zero}"]] = one.work.elements * share.accumulation
        matrix[row, place[f"settling{zero}"]] = one.work.elements
        wanted[row] = one.busy - kernels_of[row]
    weight = 1 / np.array([one.busy for one in stepped])
    byte = 1 / start.backward["weights"]  # AdamW moves about as they do; copies too
    guess = np.array([byte, start.step, *start.hooks, *(byte * moved for moved in (*start.copies, *start.settling))])
    least, most = np.zeros(len(names)), np.full(len(names), np.inf)
    least[0], most[0] = byte / (CACHED if sheet else UNSURE), byte * SLOWEST
    most[place["copies0"] :] = MOVED * byte
    x = bounded(matrix * weight[:, None], wanted * weight, guess, least, most).tolist()
    byte = x[0]
    told = {"update", "settling", *(("step",) if sheet else ("hooks", "copies"))}
    found = replace(
        start, update=1 / byte, step=x[1], hooks=tuple(x[2:6]), copies=tuple(value / byte for value in x[6:10]),
        settling=tuple(value / byte for value in x[10:]), measured=tuple({*start.measured, *told}),
    )  # fmt: skip
    if all(one.work.share.replicas == 1 for one in stepped):  # nobody sent anything
        return found
    wire, latency = _wire(stepped, start)
    return replace(found, wire=wire, latency=latency, measured=(*found.measured, "wire", "latency"))


def _wire(stepped: Sequence[Stepped], start: Rates) -> tuple[float, float]:
    """Bytes/s between the ranks of this machine, and seconds of a collective beside them."""
    sent = [sum(traffic.sent for traffic in of_step(one.work.share)) for one in stepped]
    times = [sum(operations_of(traffic, one.work, one.terms) for traffic in of_step(one.work.share)) for one in stepped]
    waits = np.array([one.waits for one in stepped])
    weight = 1 / np.array([one.busy + one.waits for one in stepped])
    matrix = np.array([sent, times], dtype=np.float64).T
    guess = np.array([1 / start.wire, start.latency])
    x = bounded(matrix * weight[:, None], waits * weight, guess, guess / UNSURE, np.array([SLOWEST, np.inf]) * guess)
    return 1 / float(x[0]), float(x[1])
