"""Which nodes are left out because they hold the others up."""

import json
from pathlib import Path

import pytest

from slurm.slow import OFTEN, chosen, slow_hosts

HOSTS = ["n1", "n1", "n2", "n2"]


def verdict(rank: int, times: float) -> str:
    return json.dumps({"event": "guard", "of": "slow_rank", "rank": [rank], "times": times}) + "\n"


def test_a_node_whose_ranks_are_named_often_is_slow(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text(verdict(0, 9.0) * OFTEN)
    since = events.stat().st_size
    with events.open("a") as file:
        file.write(verdict(2, 1.6) + verdict(3, 1.5) + verdict(0, 2.0) + '{"event": "guard", "of": "spike"}\n')
        file.write(verdict(2, 1.7) + verdict(99, 5.0) * OFTEN + '{"of": "slow_rank", "ra')
    assert slow_hosts(events, since, HOSTS) == {"n2": 1.5}
    assert slow_hosts(events, 0, HOSTS) == {"n1": 2.0, "n2": 1.5}
    assert slow_hosts(tmp_path / "absent", 0, HOSTS) == {}


@pytest.mark.parametrize(
    ("slow", "counts", "used"),
    [
        ({}, [2, 4], "abcd"),
        ({}, [3], "abc"),
        ({"b": 1.5}, [3, 4], "acd"),  # 3 nodes do more than 4 / 1.5
        ({"b": 1.1}, [3, 4], "abcd"),
        ({"b": 1.5}, [4], "abcd"),
        ({"a": 2.0, "c": 1.9}, [2, 3, 4], "abcd"),  # 4 / 2 is as much as 2, and the whole is kept
        ({"a": 3.0, "c": 1.9}, [1, 2, 3], "bd"),
        ({}, [8], "abcd"),  # nothing fits: the run itself says why
        ({}, [], "abcd"),
    ],
)
def test_the_nodes_that_do_most_work_together(slow: dict[str, float], counts: list[int], used: str) -> None:
    assert "".join(chosen("abcd", slow, counts)) == used
