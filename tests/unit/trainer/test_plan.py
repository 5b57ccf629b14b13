"""The layout of a global batch: every sample once, groups whole, clear refusals."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Cluster, Data, Norm, Parallel, Run
from trainer.cluster import local_ranks
from trainer.plan import layout


def run_of(batch: int, group: int, micro: int = 0) -> Run:
    return replace(
        Run(),
        data=Data(global_batch=batch),
        norm=Norm(replica_batch=group),
        parallel=Parallel(micro_batch=micro),
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 5), st.integers(0, 3), st.integers(1, 5))
def test_every_position_once_and_groups_whole(
    world_power: int, group_power: int, micro_power: int, steps_power: int, odd: int
) -> None:
    world = 2**world_power * odd
    micro, group = 2**micro_power, 2 ** max(1, group_power)
    batch = world * micro * 2**steps_power
    try:
        plan = layout(run_of(batch, group, micro), world)
    except InputError:
        assert group > micro or micro % group or batch % group
        return
    seen: list[int] = []
    for step in range(plan.accumulation):
        for first in range(0, world, plan.team):
            passes = [plan.slices(rank)[step] for rank in range(first, first + plan.team)]
            positions = [position for low, high in passes for position in range(low, high)]
            assert positions == list(range(positions[0], positions[0] + len(positions)))  # a team's pass is one piece
            assert positions[0] % group == 0
            assert len(positions) % group == 0
            seen += positions
    assert sorted(seen) == list(range(batch))


def test_group_spans_two_ranks() -> None:
    plan = layout(run_of(32, 16, 8), 4)
    assert (plan.team, plan.accumulation) == (2, 1)
    assert plan.slices(1) == [(8, 16)]
    assert plan.slices(2) == [(16, 24)]


def test_accumulation_keeps_team_slices_contiguous() -> None:
    plan = layout(run_of(32, 8, 4), 2)
    assert plan.team == 2
    assert plan.slices(0) == [(0, 4), (8, 12), (16, 20), (24, 28)]
    assert plan.slices(1) == [(4, 8), (12, 16), (20, 24), (28, 32)]


@pytest.mark.parametrize(
    ("run", "world", "words"),
    [
        (run_of(64, 16), 3, ("data.global_batch = 64", "3 ranks", "world size", "2", "batch: 63")),
        (run_of(64, 24), 2, ("norm.replica_batch = 24", "divide data.global_batch", "16")),
        (run_of(64, 16, 12), 2, ("parallel.micro_batch = 12", "nearest valid: 8")),
    ],
)
def test_refusals_name_field_value_rule_and_nearest(run: Run, world: int, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        layout(run, world)
    for word in words:
        assert word in str(refused.value)


def test_ranks_of_a_machine_are_the_most_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    on_gpus = replace(run_of(64, 16), cluster=Cluster(device="cuda"))
    assert local_ranks(on_gpus) == 4
    assert local_ranks(replace(on_gpus, cluster=Cluster(device="cuda", ranks=7))) == 7
    assert local_ranks(replace(on_gpus, cluster=Cluster(device="cpu"))) == 2
