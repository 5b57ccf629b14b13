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
from trainer.planning.fitting import Stepped, Timed
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
    assert fitting.non_negative(matrix, matrix @ x, np.zeros(5)) == pytest.approx(x, rel=1e-4)
    wanted = matrix @ np.array([1.0, -2.0, 0.5, 3.0, 1.5])
    assert fitting.non_negative(matrix, wanted, np.zeros(5)).min() == 0.0
    untold = np.hstack([matrix, np.zeros((40, 1))])  # nothing says anything of the last one
    guess = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 7.0])
    assert fitting.non_negative(untold, matrix @ x, guess)[-1] == pytest.approx(7.0)
