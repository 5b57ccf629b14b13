"""Seconds of a step: the closed form of a pipeline beside its schedule played through, traffic, what is made again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.planning import step_time
from trainer.planning.rates import Rates
from trainer.planning.roofline import Seconds
from trainer.planning.step_time import StageWork, Terms
from trainer.stages.schedule import Compute, one_forward_one_backward
from trainer.stages.wire import Share

from .conftest import machines_of, rates_of

TERMS = Terms(recompute="none", overlap=False, bucket=1 << 20, offload="none", ema=False)


def bare(**changes: Any) -> Rates:
    """Rates under which only the kernels take time."""
    nothing = {
        "launch": 0.0, "step": 0.0, "hooks": (0.0,) * 4, "copies": (0.0,) * 4, "settling": (0.0,) * 4, "wire": 1e30,
        "network": 1e30, "latency": 0.0, "hop": 0.0, "update": 1e30, "share": 1.0,
    }  # fmt: skip
    return replace(rates_of()["eager"], **{**nothing, **changes})


def stage_of(forward: float, backward: float, **share: Any) -> StageWork:
    """A stage of one map of a million weights."""
    groups = (np.array([[1_000_000, 1]]), np.zeros((0, 2), dtype=np.int64))
    plain: dict[str, Any] = {
        "zero": 1, "dtype": "bf16", "recompute": "none", "accumulation": 1, "replicas": 1, "stages": 1, "stage": 0,
        "groups": groups, "channels": 0, "team": 1, "to_next": 0, "to_previous": 0, "threshold": 0, "reuse": 10**9,
    }  # fmt: skip
    seconds = Seconds(
        forward, backward, selective=0.1 * forward, full=0.9 * forward, calls=10, forward_calls=4, selective_calls=1,
        full_calls=3,
    )  # fmt: skip
    return StageWork(seconds, Share(**{**plain, **share}), blocks=1, elements=1_000_000, tensors=1, norms=0)


def played(times: list[tuple[float, float]], micros: int) -> float:
    """Seconds of a 1F1B step whose transfers take no time: every stage goes on as soon as what it needs is there."""
    stages = len(times)
    orders = [[step for step in one_forward_one_backward(stages, number, micros) if isinstance(step, Compute)]
              for number in range(stages)]  # fmt: skip
    done: dict[tuple[int, str, int], float] = {}
    clocks, places = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for number, order in enumerate(orders):
            if places[number] == len(order):
                continue
            step = order[places[number]]
            near = number - 1 if step.kind == "forward" else number + 1
            if 0 <= near < stages and (near, step.kind, step.micro) not in done:
                continue
            ready = done.get((near, step.kind, step.micro), 0.0)
            took = times[number][0 if step.kind == "forward" else 1]
            clocks[number] = done[number, step.kind, step.micro] = max(clocks[number], ready) + took
            places[number] += 1
    return max(clocks)


@given(
    st.lists(st.tuples(st.floats(0.2, 1.0), st.floats(0.5, 2.0)), min_size=1, max_size=6),
    st.integers(1, 12),
)
@settings(max_examples=200, deadline=None)
def test_a_pipeline_takes_as_long_as_its_schedule(times: list[tuple[float, float]], micros: int) -> None:
    stages = [
        stage_of(*pair, stages=len(times), stage=number, accumulation=micros) for number, pair in enumerate(times)
    ]
    found = step_time.of_layout(stages, TERMS, machines_of(len(times)), bare()).total
    exact = played(times, micros)
    assert found <= exact * (1 + 1e-9)  # it is a lower bound, and reached unless stages take turns at being slowest
    assert found == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("micros", [2, 8])
def test_an_even_pipeline_has_the_bubble_of_the_textbook(micros: int) -> None:
    stages = [stage_of(1.0, 2.0, stages=4, stage=number, accumulation=micros) for number in range(4)]
    found = step_time.of_layout(stages, TERMS, machines_of(4), bare())
    assert found.total == pytest.approx(played([(1.0, 2.0)] * 4, micros))
    assert found.bubble / found.total == pytest.approx(3 / (micros + 3))  # (p - 1) / (m + p - 1)
    assert found.compute == 3.0 * micros


@pytest.mark.parametrize("stages", [2, 4])
def test_a_processor_is_quicker_while_others_wait(stages: int) -> None:
    """An even pipeline: of its (m + p - 1) parts each stage waits for p - 1, in which the others share its core."""
    works = [stage_of(1.0, 2.0, stages=stages, stage=number, accumulation=8) for number in range(stages)]
    shared = step_time.of_layout(works, TERMS, machines_of(stages), bare(alone=1.5))
    plain = step_time.of_layout(works, TERMS, machines_of(stages), bare())
    assert plain.total == 3.0 * (8 + stages - 1)
    assert shared.total == pytest.approx(plain.total - stages * 3.0 * (1 - 1 / 1.5))
    assert step_time.of_layout([stage_of(1.0, 2.0)], TERMS, machines_of(1), bare(alone=1.5)).total == 3.0
    apart = replace(machines_of(stages), per_node=1)
    assert step_time.of_layout(works, TERMS, apart, bare(alone=1.5)).total == pytest.approx(plain.total, rel=1e-6)


def test_what_is_made_again_costs_what_it_is() -> None:
    stage = stage_of(1.0, 2.0)
    for kind, more in (("none", 0.0), ("selective", 0.1), ("full", 0.9)):
        found = step_time.of_layout([stage], replace(TERMS, recompute=kind), machines_of(1), bare())
        assert found.again == pytest.approx(more)
        assert found.total == pytest.approx(3.0 + more)
    first = stage_of(1.0, 2.0, zero=3, stages=2, stage=0, accumulation=8)
    last = stage_of(1.0, 2.0, zero=3, stages=2, stage=1, accumulation=8)
    found = step_time.of_layout([first, last], TERMS, machines_of(2), bare())
    assert found.again == pytest.approx(8.0)  # the first stage makes its forward passes again, the last does not


@pytest.mark.parametrize(
    ("zero", "payload"),
    [
        (0, 2 * 4e6),  # gradients in fp32
        (1, 2 * 2e6 + 4e6),  # in bf16, and the new weights in fp32
        (2, 2 * 2 * 2e6 + 4e6),  # of both micro-batches
        (3, 2 * 2e6 + 2 * 2e6),  # reduced to their owners, and weights that are kept from pass to pass
    ],
)
def test_traffic_takes_its_bytes_over_the_slowest_link(zero: int, payload: float) -> None:
    stage = stage_of(1.0, 2.0, zero=zero, accumulation=2, replicas=16)
    for near, bus in ((16, 1e9), (8, 8 * 0.05e9)):  # one machine; two, over eight networks at once
        found = step_time.of_layout([stage], TERMS, machines_of(16, per_node=near), bare(wire=1e9, network=0.05e9))
        assert found.traffic == pytest.approx(payload * 15 / 16 / bus, rel=0.01)
        assert found.exposed == found.traffic


def test_traffic_hides_behind_the_backward_pass_where_it_may() -> None:
    stage = stage_of(1.0, 2.0, zero=3, accumulation=2, replicas=16)
    hidden = step_time.of_layout([stage], replace(TERMS, overlap=True), machines_of(16), bare(wire=1e9, overlap=0.5))
    assert hidden.exposed < hidden.traffic
    slow = step_time.of_layout([stage], replace(TERMS, overlap=True), machines_of(16), bare(wire=1e6, overlap=0.5))
    assert slow.traffic - slow.exposed == pytest.approx(2 * 0.5 * 2.0)  # half of each backward pass, and no more


def test_a_group_of_neighbours_spares_the_network() -> None:
    slow = bare(wire=1e9, network=1e6)
    alone, grouped = (
        step_time.of_layout(
            [stage_of(1.0, 2.0, zero=3, replicas=64, reuse=0, shard=group)], TERMS, machines_of(64), slow
        ).traffic
        for group in (0, 8)
    )
    assert grouped < 0.8 * alone


def test_the_update_is_that_of_the_own_piece_and_goes_where_the_states_are() -> None:
    speed = bare(update=1e9, host=1e8, disk=1e7)
    own = {}
    for zero in (0, 1):
        stage = stage_of(1.0, 2.0, zero=zero, replicas=4)
        own[zero] = step_time.of_layout([stage], TERMS, machines_of(4), speed).update
    assert own[0] == pytest.approx(32e6 / 1e9)
    assert own[1] == pytest.approx(own[0] / 4)
    stage = stage_of(1.0, 2.0, zero=1, replicas=4)
    moved = step_time.of_layout([stage], replace(TERMS, offload="cpu"), machines_of(4), speed).update
    assert moved - own[1] == pytest.approx(2 * 4 * 250_000 / 1e8)
    on_disk = step_time.of_layout([stage], replace(TERMS, offload="nvme"), machines_of(4), speed).update
    assert on_disk - moved == pytest.approx(6 * 4 * 250_000 / 1e7)


def test_a_gpu_waits_for_its_host_and_a_processor_is_its_own() -> None:
    stage = stage_of(0.001, 0.002)
    gpu = step_time.of_layout([stage], TERMS, machines_of(1), bare(launch=1e-3))
    assert gpu.total == pytest.approx(0.01)  # ten kernels
    for recompute, kernels in (("selective", 11), ("full", 13)):  # which the host starts again
        again = step_time.of_layout([stage], replace(TERMS, recompute=recompute), machines_of(1), bare(launch=1e-3))
        assert again.total == pytest.approx(kernels * 1e-3)
    hooks = (0.0, 5e-3, 0.0, 0.0)
    cpu = step_time.of_layout([stage], TERMS, machines_of(1), bare(hooks=hooks))
    assert cpu.total == pytest.approx(0.003 + 5e-3)


def test_the_parts_are_the_whole() -> None:
    stages = [stage_of(1.0, 2.0, stages=2, stage=number, accumulation=4, replicas=4, zero=1) for number in range(2)]
    found = step_time.of_layout(stages, TERMS, machines_of(8), rates_of()["eager"])
    parts = (found.compute, found.again, found.bubble, found.exposed, found.update, found.rest)
    assert found.total == sum(parts)
    assert all(part >= 0 for part in parts)
