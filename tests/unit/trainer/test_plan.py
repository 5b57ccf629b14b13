"""The layout of a global batch: every sample once, groups whole, clear refusals."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Cluster, Data, Norm, Parallel, Run
from trainer.cluster import local_ranks
from trainer.plan import layout


def run_of(batch: int, group: int, micro: int = 0, stages: int = 1) -> Run:
    return replace(
        Run(),
        data=Data(global_batch=batch),
        norm=Norm(replica_batch=group),
        parallel=Parallel(micro_batch=micro, pipeline=stages),
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


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), st.integers(1, 12))
def test_stages_share_a_replicas_part_of_the_batch(stages: int, replicas: int, micro_power: int, steps: int) -> None:
    micro = 2 ** (1 + micro_power)
    plan = layout(run_of(replicas * micro * steps, 2, micro, stages), stages * replicas)
    assert (plan.stages, plan.replicas, plan.accumulation, plan.micro_batch) == (stages, replicas, steps, micro)
    positions = [
        place for replica in range(replicas) for low, high in plan.slices(replica) for place in range(low, high)
    ]
    assert sorted(positions) == list(range(plan.global_batch))
    alone = layout(run_of(replicas * micro * steps, 2, micro), replicas)  # what a stage sees is what a rank alone would
    assert [plan.slices(replica) for replica in range(replicas)] == [
        alone.slices(replica) for replica in range(replicas)
    ]


@pytest.mark.parametrize(
    ("batch", "stages", "world", "micro"),
    [(64, 1, 2, 32), (64, 2, 4, 8), (64, 4, 4, 8), (64, 2, 2, 16), (16, 4, 8, 1), (8, 4, 4, 2)],
)
def test_an_open_micro_batch_leaves_twice_as_many_as_stages(batch: int, stages: int, world: int, micro: int) -> None:
    plan = layout(run_of(batch, 2, 0, stages), world)
    assert plan.micro_batch == micro
    # The last case has too few samples for that, and takes the smallest that keeps a BatchNorm group whole.
    assert stages == 1 or plan.accumulation >= 2 * stages or (batch, micro) == (8, 2)
    assert plan.accumulation * plan.replicas * micro == batch


@pytest.mark.parametrize(("stages", "world"), [(3, 4), (5, 4), (2, 3), (4, 6), (7, 12)])
def test_stages_that_do_not_divide_the_ranks_are_refused_with_what_would(stages: int, world: int) -> None:
    with pytest.raises(InputError, match=f"parallel.pipeline = {stages}: must divide the {world} ranks") as refused:
        layout(run_of(7680, 2, 2, stages), world)
    nearest, ranks = re.findall(r"nearest valid: (\d+), or (\d+) ranks", str(refused.value))[0]
    assert layout(run_of(7680, 2, 2, int(nearest)), world).stages == int(nearest)
    assert all(world % other or abs(other - stages) >= abs(int(nearest) - stages) for other in range(1, world + 1))
    assert int(ranks) >= world
    assert int(ranks) % stages == 0


def test_the_batch_is_divided_over_replicas_and_the_nearest_ranks_count_stages() -> None:
    with pytest.raises(InputError, match=r"data.global_batch = 64") as refused:
        layout(run_of(64, 2, 2, 2), 6)
    (world,) = re.findall(r"nearest world size that does: (\d+)", str(refused.value))
    assert layout(run_of(64, 2, 2, 2), int(world)).replicas * 2 == int(world)


def test_a_group_may_span_replicas_of_a_stage_only() -> None:
    plan = layout(run_of(32, 16, 8, 2), 4)
    assert (plan.team, plan.replicas) == (2, 2)
    with pytest.raises(InputError, match=r"parallel.micro_batch = 4"):
        layout(run_of(32, 16, 4, 2), 4)  # four micro-batches of a group, two replicas


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


@pytest.mark.parametrize(
    ("group", "world", "nearest"), [(0, 8, None), (2, 8, None), (4, 8, None), (3, 8, "2"), (8, 8, "4"), (2, 2, "0")]
)
def test_a_shard_group_divides_the_ranks(group: int, world: int, nearest: str | None) -> None:
    run = run_of(64, 2, 2)
    run = replace(run, parallel=replace(run.parallel, shard_group=group))
    if nearest is None:
        assert layout(run, world).world == world
        return
    with pytest.raises(InputError, match=f"parallel.shard_group = {group}: .*nearest valid: {nearest}$"):
        layout(run, world)
