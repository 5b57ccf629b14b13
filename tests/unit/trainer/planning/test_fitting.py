"""Rates are found again from steps that were made up with them; what cannot be told apart stays near a first guess."""

from dataclasses import replace
from itertools import product
from typing import Literal

import numpy as np
import pytest

from configs import resolve
from configs.schema import Run
from models import spec
from models.operations import WORKS, BlockTraffic
from models.traffic import traffic
from trainer.machine import devices
from trainer.plan import layout
from trainer.planning import fitting, rates
from trainer.planning.choose import Planner
from trainer.planning.fitting import Started, Stepped, Timed
from trainer.planning.machines import Machines
from trainer.planning.rates import Rates
from trainer.planning.roofline import of_block

CPU = devices.named("cpu", 2)
ZEROS: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
MACHINES = Machines(CPU, 2, 2, 1e9)


def start() -> Rates:
    return rates.assumed(CPU, "bf16", "eager", 2, "auto", 1e9)


def truth() -> Rates:
    """A processor unlike the assumed one."""
    factors = np.linspace(0.3, 3, len(WORKS))
    forward = {work: start().forward[work] * float(factor) for work, factor in zip(WORKS, factors, strict=True)}
    backward = {work: speed * 0.8 for work, speed in forward.items()}
    return replace(
        start(), forward=forward, backward=backward, call=3e-5, update=backward["weights"],
        hooks=(2e-5, 5e-5, 6e-5, 2e-4), copies=(10.0, 20.0, 30.0, 40.0), settling=(20.0, 30.0, 10.0, 10.0),
        wire=1.5e9, latency=2e-4, share=1.0,
    )  # fmt: skip


def blocks_of(name: str, resolution: int) -> dict[object, BlockTraffic]:
    blocks = traffic(spec.get(name), resolution, dtype="bf16", device="cpu")
    return {block.operations: block for block in blocks}


def timed(names: list[str], speed: Rates, noise: float = 0.0) -> list[Timed]:
    draw = np.random.default_rng(0)
    found = []
    for name, resolution, batch in product(names, (96, 160, 224), (2, 8)):
        for block in blocks_of(name, resolution).values():
            took = of_block(block, speed, batch)
            wrong = 1 + noise * draw.standard_normal(2)
            found.append(Timed(block, batch, (took.forward * wrong[0], took.backward * wrong[1])))
    return found


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_blocks_of_other_networks_are_foretold_from_what_was_measured(noise: float) -> None:
    found = fitting.kernels(timed(["coatnet0", "coatnet1"], truth(), noise), start())
    assert {"forward", "backward"} <= set(found.measured)
    for name in ("coatnet2", "coatnet3"):
        blocks = blocks_of(name, 224).values()
        pairs = [(of_block(block, truth(), 4), of_block(block, found, 4)) for block in blocks]
        for way in ("forward", "backward"):
            expected, got = zip(*((getattr(one, way), getattr(other, way)) for one, other in pairs), strict=True)
            assert got == pytest.approx(expected, rel=0.15 + 2 * noise)
            assert sum(got) == pytest.approx(sum(expected), rel=0.03 + noise)


def test_no_rate_is_below_zero_and_none_is_lost() -> None:
    found = fitting.kernels(timed(["coatnet0"], truth(), 0.2), start())
    assert found.forward.keys() == set(WORKS)
    assert all(speed > 0 for speed in (*found.forward.values(), *found.backward.values()))
    assert found.call >= 0


def run_of(name: str, zero: Literal[0, 1, 2, 3], accumulation: int) -> Run:
    run = resolve.load("coatnet0-in1k-224")
    return replace(
        run, model=replace(run.model, name=name, drop_path=0.0), norm=replace(run.norm, replica_batch=4),
        data=replace(run.data, global_batch=8 * accumulation), cluster=replace(run.cluster, device="cpu"),
        parallel=replace(run.parallel, zero=zero, micro_batch=4, recompute="none"),
    )  # fmt: skip


def stepped(names: list[str], speed: Rates) -> tuple[list[Stepped], dict[int, float]]:
    """Steps as the planner itself foretells them at `speed`: what the thread does, and the clock's."""
    found: list[Stepped] = []
    kernels: dict[int, float] = {}
    for name, zero, accumulation in product(names, ZEROS, (1, 2)):
        run = run_of(name, zero, accumulation)
        plan = layout(run, 2)
        planner = Planner(run, 1000, MACHINES, {"eager": speed})
        works, terms = planner.works(run, plan)
        time = planner.seconds(run.parallel, plan)
        kernels[len(found)] = (works[0].seconds.forward + works[0].seconds.backward) * accumulation
        found.append(Stepped(works[0], terms, time.total - time.exposed, time.exposed))
    return found, kernels


def test_what_lies_between_blocks_is_foretold_for_other_networks() -> None:
    known = replace(truth(), hooks=start().hooks, copies=start().copies, settling=start().settling, wire=1e9)
    found = fitting.steps(*stepped(["coatnet-nano", "coatnet0", "coatnet1"], truth()), known)
    assert found.wire == pytest.approx(1.5e9, rel=0.1)
    assert found.latency == pytest.approx(2e-4, rel=0.3)
    for zero, accumulation in product(ZEROS, (1, 4)):
        run = run_of("coatnet3", zero, accumulation)
        plan = layout(run, 2)
        expected, got = (
            Planner(run, 1000, MACHINES, {"eager": speed}).seconds(run.parallel, plan).total
            for speed in (truth(), found)
        )
        assert got == pytest.approx(expected, rel=0.03)


def test_the_least_squares_are_those_of_linear_algebra_where_nothing_is_below_zero() -> None:
    draw = np.random.default_rng(1)
    matrix, x = draw.uniform(0.1, 1, (40, 5)), np.array([1.0, 2.0, 0.5, 3.0, 1.5])
    assert fitting.bounded(matrix, matrix @ x, np.zeros(5)) == pytest.approx(x, rel=1e-4)
    wanted = matrix @ np.array([1.0, -2.0, 0.5, 3.0, 1.5])
    assert fitting.bounded(matrix, wanted, np.zeros(5)).min() == 0.0
    untold = np.hstack([matrix, np.zeros((40, 1))])  # nothing says anything of the last one
    guess = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 7.0])
    assert fitting.bounded(untold, matrix @ x, guess)[-1] == pytest.approx(7.0)


def test_no_bound_is_left() -> None:
    draw = np.random.default_rng(2)
    matrix = draw.uniform(0.1, 1, (40, 3))
    wanted = matrix @ np.array([5.0, 0.1, 1.0])
    found = fitting.bounded(matrix, wanted, np.ones(3), 0.5, np.array([2.0, 9.0, 9.0]))
    assert found.tolist()[0] == 2.0
    assert found.min() >= 0.5
    assert found[2] > 1.0  # takes over what the first may not
    assert fitting.bounded(matrix, wanted, np.ones(3), 0.5).tolist()[1] == 0.5


H200 = devices.named("h200", 1)


def on_gpu() -> Rates:
    return rates.assumed(H200, "bf16", "eager", 0, "auto", 1e9)


def test_no_gpu_is_faster_than_its_data_sheet() -> None:
    """Blocks without any arithmetic: whatever explains them best, no product is infinitely fast."""
    true = replace(on_gpu(), forward={work: speed * 1e3 for work, speed in on_gpu().forward.items()}, call=1e-5)
    blocks = [
        Timed(block, 8, (took.forward, took.backward))
        for block in traffic(spec.get("coatnet0"), 224, dtype="bf16", device="cuda")
        for took in [of_block(block, true, 8)]
    ]
    found = fitting.kernels(blocks, on_gpu())
    assert H200.peak is not None
    for way in (found.forward, found.backward):
        assert max(way[work] for work in rates.MATH) <= H200.peak * (1 + 1e-9)
        assert max(way.values()) <= H200.peak * (1 + 1e-9)
        assert max(way[work] for work in WORKS if work not in rates.MATH) <= 1.4 * H200.bandwidth
    assert found.call <= 5e-6


def test_the_host_is_told_from_runs_in_which_the_device_waits() -> None:
    runs = [
        Started(0, 0.050, 0.051, 1000, 300),  # the device is at work
        Started(0, 0.025, 1000 * 4e-5 + 300 * on_gpu().hooks[0], 1000, 300),  # it waits
        Started(3, 0.050, 1000 * 4e-5 + 300 * 2e-4, 1000, 300),
        Started(1, 0.050, 0.052, 1000, 300),
    ]
    found = fitting.host(runs, on_gpu())
    assert found.launch == pytest.approx(4e-5)
    assert found.hooks[3] == pytest.approx(2e-4)
    assert found.hooks[1] == pytest.approx(on_gpu().hooks[1])  # at most 4e-5, so what was assumed stays
    assert found.hooks[2] == on_gpu().hooks[2]  # nothing was measured


def test_a_host_that_was_never_waited_for_is_no_slower_than_the_runs() -> None:
    assert fitting.host([Started(0, 0.05, 0.051, 1000, 300)], on_gpu()).launch == on_gpu().launch
    short = fitting.host([Started(0, 0.004, 0.0041, 1000, 300)], on_gpu())
    assert short.launch == pytest.approx((0.0041 - 300 * on_gpu().hooks[0]) / 1000)
