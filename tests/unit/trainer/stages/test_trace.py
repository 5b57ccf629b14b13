"""The proof that ranks cannot wait in a circle: it accepts what is sound and names the culprit of what is not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.stages.schedule import Step, one_forward_one_backward
from trainer.stages.trace import Operation, Program, TraceError, check, load, of_schedules, read


def schedules(stages: int, micros: int) -> list[list[Step]]:
    return [one_forward_one_backward(stages, stage, micros) for stage in range(stages)]


def call(kind: str, group: str, *ranks: int, content: str = "8 bytes", place: str = "here") -> tuple[Operation, ...]:
    """A collective as a node."""
    return (Operation(kind, group, ranks, None, content, place),)


def transfer(kind: str, peer: int, *ranks: int, content: str = "8 bytes", place: str = "here") -> Operation:
    return Operation(kind, "pipe", ranks, peer, content, place)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("micros", range(1, 13))
def test_no_schedule_can_wait_for_itself(stages: int, micros: int) -> None:
    assert check(of_schedules(schedules(stages, micros))) == 2 * micros * (stages - 1)


@pytest.mark.parametrize(("stages", "micros"), [(2, 2), (3, 4), (4, 8), (8, 12)])
def test_an_exchange_in_two_steps_is_refused(stages: int, micros: int) -> None:
    programs: dict[int, Program] = {
        rank: [(part,) for node in program for part in node]
        for rank, program in of_schedules(schedules(stages, micros)).items()
    }
    with pytest.raises(TraceError) as refused:
        check(programs)
    told = str(refused.value)
    assert "could wait for each other for ever" in told
    assert "send of activation" in told
    assert "send of gradient" in told


def test_the_circle_is_told_with_ranks_operations_and_places() -> None:
    programs = of_schedules(schedules(2, 3))
    split: dict[int, Program] = {rank: [(part,) for node in nodes for part in node] for rank, nodes in programs.items()}
    with pytest.raises(TraceError) as refused:
        check(split)
    assert str(refused.value).splitlines()[1:] == [
        "rank 0 waits in send of activation 1 to rank 1 in group pipe [0, 1] (step 3 of the stage)",
        "  for rank 1, which comes later to its receive of activation 1 from rank 0 in group pipe [0, 1] "
        "(step 3 of the stage)",
        "rank 1 waits in send of gradient 0 to rank 0 in group pipe [0, 1] (step 3 of the stage)",
        "  for rank 0, which comes later to its receive of gradient 0 from rank 1 in group pipe [0, 1] "
        "(step 3 of the stage)",
    ]


def test_a_gradient_wanted_before_its_activation_was_sent_is_refused() -> None:
    programs = of_schedules(schedules(3, 4))
    (first,), (second,), (third, gradient) = programs[0][:3]
    programs[0][:3] = [(gradient,), (first,), (second,), (third,)]
    with pytest.raises(TraceError) as refused:
        check(programs)
    told = str(refused.value)
    assert "rank 0 waits in receive of gradient 0 from rank 1" in told
    assert "rank 1 waits in receive of activation 0 from rank 0" in told
    assert "rank 2" not in told.replace("[0, 1, 2]", "")  # it waits too, but is no part of the circle


@pytest.mark.parametrize("kind", ["send", "receive"])
def test_a_transfer_with_one_end_is_refused(kind: str) -> None:
    programs = of_schedules(schedules(3, 4))
    wrong = (kind, "activation 3")
    nodes = [tuple(part for part in node if (part.kind, part.content) != wrong) for node in programs[1]]
    programs[1] = [node for node in nodes if node]
    told = "rank 0: send of activation 3.* rank 1 never receives it"
    if kind == "send":
        told = "rank 2: receive of activation 3.* rank 1 never sends it"
    with pytest.raises(TraceError, match=told):
        check(programs)


def test_transfers_are_matched_in_order() -> None:
    programs = of_schedules(schedules(2, 2))
    programs[1][0] = (replace(programs[1][0][0], content="activation 1"),)
    with pytest.raises(TraceError, match=r"rank 0: send of activation 0 .*\nmeets rank 1: receive of activation 1"):
        check(programs)


def test_two_groups_in_different_orders_are_refused() -> None:
    # Each group alone is in order; together rank 0 waits for rank 1 in one, rank 1 for rank 0 in the other.
    here, there = call("all_reduce", "a", 0, 1, place="x.py:1"), call("all_gather", "b", 0, 1, place="y.py:2")
    assert check({0: [here, there], 1: [here, there]}) == 2
    with pytest.raises(TraceError) as refused:
        check({0: [here, there], 1: [there, here]})
    assert "rank 0 waits in all_reduce of 8 bytes in group a [0, 1] (x.py:1)" in str(refused.value)
    assert "rank 1 waits in all_gather of 8 bytes in group b [0, 1] (y.py:2)" in str(refused.value)


def test_a_circle_of_three_ranks_is_found() -> None:
    pairs = [call("barrier", name, *ranks) for name, ranks in (("a", (0, 1)), ("b", (1, 2)), ("c", (0, 2)))]
    a, b, c = pairs
    assert check({0: [a, c], 1: [a, b], 2: [b, c]}) == 3
    with pytest.raises(TraceError) as refused:
        check({0: [a, c], 1: [b, a], 2: [c, b]})
    assert all(f"rank {rank} waits in barrier" in str(refused.value) for rank in range(3))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ([call("all_gather", "a", 0, 1)], "rank 0: all_reduce of 8 bytes .*\nmeets rank 1: all_gather of 8 bytes"),
        ([call("all_reduce", "a", 0, 1, content="16 bytes")], "meets rank 1: all_reduce of 16 bytes"),
        ([], "rank 0: all_reduce .* rank 1 never comes to it"),
        ([call("all_reduce", "a", 0, 1)] * 2, "rank 1: all_reduce .* rank 0 never comes to it"),
    ],
)
def test_ranks_that_disagree_about_a_collective_are_refused(other: Program, told: str) -> None:
    with pytest.raises(TraceError, match=told):
        check({0: [call("all_reduce", "a", 0, 1)], 1: other})


def test_a_batch_is_one_operation() -> None:
    def both(peer: int) -> tuple[Operation, ...]:
        return transfer("send", peer, 0, 1), transfer("receive", peer, 0, 1)

    assert check({0: [both(1)], 1: [both(0)]}) == 2
    with pytest.raises(TraceError, match="for ever"):
        check({0: [both(1)[:1], both(1)[1:]], 1: [both(0)[:1], both(0)[1:]]})


def test_who_is_unknown_proves_nothing() -> None:
    with pytest.raises(TraceError, match="there is no trace of rank 1"):
        check({0: [call("barrier", "a", 0, 1)]})
    with pytest.raises(TraceError, match="not in the group"):
        check({0: [call("barrier", "a", 1, 2)], 1: [], 2: []})
    anyone = (replace(transfer("receive", 0, 0, 1), peer=None),)
    with pytest.raises(TraceError, match="must be one other rank"):
        check({0: [anyone], 1: []})


FACTS = {"rank": 0, "world": 1, "control": "1", "share": {}}
LINES: list[dict[str, Any]] = [
    FACTS,
    {"part": "step 1"},
    {"n": 0, "op": "all_reduce", "group": "0", "ranks": [0], "bytes": 8, "dtype": "float32", "reduce": "SUM",
     "place": "a.py:1"},
    {"wait": [0]},
    {"n": 1, "op": "send", "group": "0", "ranks": [0, 1], "peer": 1, "bytes": 4, "dtype": "int64", "batch": 1,
     "place": "a.py:2"},
    {"n": 2, "op": "receive", "group": "0", "ranks": [0, 1], "peer": 1, "bytes": 4, "dtype": "int64", "batch": 1,
     "place": "a.py:2"},
    {"mark": "forward", "micro": 0},
    {"wait": [2]},
    {"part": "after step 1"},
    {"n": 3, "op": "barrier", "group": "1", "ranks": [0], "bytes": 0, "dtype": "", "place": "a.py:3"},
]  # fmt: skip


def written(folder: Path, lines: list[dict[str, Any]], rank: int = 0) -> Path:
    path = folder / f"rank-{rank:05d}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_is_read_by_parts_and_batches(tmp_path: Path) -> None:
    found = read(written(tmp_path, LINES))
    assert {part: [len(node) for node in nodes] for part, nodes in found.steps.items()} == {
        "step 1": [1, 2],
        "after step 1": [1],
    }
    reduce, (send, receive), barrier = found.program[0][0], found.program[1], found.program[2][0]
    assert reduce.blocking  # its wait follows at once
    assert not send.blocking
    assert not receive.blocking
    assert reduce.content == "8 bytes of float32, reduce SUM"
    assert barrier.content == ""
    assert (send.peer, send.bytes, send.dtype) == (1, 4, "int64")
    assert reduce.place == "rank-00000.jsonl:3, a.py:1"


def test_files_that_prove_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no traces; run a few steps with --parallel\.trace"):
        load(tmp_path)
    path = written(tmp_path, LINES)
    assert load(tmp_path).keys() == {0}
    written(tmp_path, [{**FACTS, "world": 3}], rank=1)
    with pytest.raises(TraceError, match=r"has ranks \[0\] of a run of 3"):
        load(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TraceError, match=r"rank-00000\.jsonl:10: cut off"):
        read(path)
    path.write_text('{"part": "step 1"}\n')
    with pytest.raises(TraceError, match="does not describe the run"):
        read(path)
