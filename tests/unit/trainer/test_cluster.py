"""The mesh of stages and replicas: arithmetic, and the process groups of real ranks."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.cluster import Member
from trainer.launch import free_port, launch
from trainer.machine.devices import peak_of


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8))
def test_ranks_count_the_replicas_of_a_stage_before_the_next_stage(stages: int, replicas: int) -> None:
    control = cast(dist.ProcessGroup, None)
    world = stages * replicas
    members = [Member(rank, world, 0, torch.device("cpu"), control, stages) for rank in range(world)]
    assert [(member.stage, member.replica) for member in members] == [
        (stage, replica) for stage in range(stages) for replica in range(replicas)
    ]
    assert {member.replicas for member in members} == {replicas}
    assert [member.rank for member in members if member.begins] == list(range(replicas))
    assert [member.rank for member in members if member.ends] == list(range(world - replicas, world))
    assert [member.rank for member in members if member.first] == [0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks saw in meshes of 1, 2, 4 and, which cannot be, 3 stages."""
    folder = tmp_path_factory.mktemp("mesh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert launch(["mesh_rank", "2,4,3,1", str(folder / "out")], 4, folder / "logs", free_port(), True) == 0
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(4)]


@pytest.mark.parametrize(
    ("stages", "data", "pipe", "team"),
    [
        (1, [[0, 1, 2, 3]] * 4, [[0], [1], [2], [3]], [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (2, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3]] * 2, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (4, [[0], [1], [2], [3]], [[0, 1, 2, 3]] * 4, [[0], [1], [2], [3]]),
    ],
)
def test_groups_reach_the_replicas_of_a_stage_and_the_stages_of_a_replica(
    stages: int, data: list[list[int]], pipe: list[list[int]], team: list[list[int]], ranks: list[dict[str, Any]]
) -> None:
    found = [rank[str(stages)] for rank in ranks]
    assert [rank["data"] for rank in found] == data
    assert [rank["pipe"] for rank in found] == pipe
    assert [rank["team"] for rank in found] == team
    assert [rank["control"] for rank in found] == [[0, 1, 2, 3]] * 4
    replicas = 4 // stages
    assert [(rank["stage"], rank["replica"]) for rank in found] == [divmod(rank, replicas) for rank in range(4)]
    assert [rank["begins"] for rank in found] == [rank < replicas for rank in range(4)]
    assert [rank["ends"] for rank in found] == [rank >= 4 - replicas for rank in range(4)]


def test_stages_that_do_not_divide_the_ranks_are_refused_on_all_alike(ranks: list[dict[str, Any]]) -> None:
    messages = {rank["3"] for rank in ranks}
    assert len(messages) == 1
    assert "parallel.pipeline = 3: must divide the 4 ranks; nearest valid: 2, or 6 ranks" in messages.pop()


def test_peaks_are_found_by_whole_words() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA RTX A1000") is None
