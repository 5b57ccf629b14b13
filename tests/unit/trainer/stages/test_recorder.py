"""The recorder writes what is called before it is called, and leaves torch as it found it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainer.stages.recorder import METHODS, STEPS, Recorder
from trainer.stages.trace import read


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wrapped() -> dict[str, Any]:
    """What the recorder changes."""
    group = {name: vars(dist.ProcessGroup).get(name) for name in (*METHODS, "_start_coalescing", "_end_coalescing")}
    module = dist.distributed_c10d
    others = (dist.batch_isend_irecv, module.batch_isend_irecv, torch.autograd.backward, vars(dist.Work)["wait"])
    return {**group, "others": others}


def test_torch_is_as_it_was(tmp_path: Path, alone: None) -> None:
    before, model = wrapped(), nn.Linear(1, 1)
    recorder = Recorder(tmp_path / "a.jsonl", {"world": 1})
    assert wrapped() != before
    recorder.close()
    assert wrapped() == before
    assert not model._forward_hooks
    dist.all_reduce(torch.ones(1))  # and it works
    assert len(lines(tmp_path / "a.jsonl")) == 1


def test_operations_waits_and_marks_in_order(tmp_path: Path, alone: None) -> None:
    model = nn.Linear(2, 1)
    recorder = Recorder(tmp_path / "a.jsonl", {"world": 1}, model)
    handle = dist.all_reduce(torch.ones(5), async_op=True)
    model(torch.ones(1, 2)).sum().backward()
    handle.wait()
    gathered = torch.empty(3, dtype=torch.bfloat16)
    dist.all_gather_into_tensor(gathered, torch.ones(3, dtype=torch.bfloat16))
    dist.broadcast(torch.ones(2, dtype=torch.int64), 0)
    dist.barrier()
    recorder.close()
    _, *found = lines(tmp_path / "a.jsonl")
    assert [line.get("op") or line.get("mark") or f"wait {line['wait']}" for line in found] == [
        "all_reduce", "forward", "end", "backward", "end", "wait [0]",
        "all_gather", "wait [1]", "broadcast", "wait [2]", "barrier", "wait [3]",
    ]  # fmt: skip
    operations = [line for line in found if "op" in line]
    assert [(line["bytes"], line["dtype"]) for line in operations] == [
        (20, "float32"), (6, "bfloat16"), (16, "int64"), (0, ""),
    ]  # fmt: skip
    assert operations[0]["reduce"] == "SUM"
    assert operations[2]["root"] == 0
    assert all("test_recorder.py:" in line["place"] for line in operations)
    assert [node[0].blocking for node in read(tmp_path / "a.jsonl").program] == [False, True, True, True]


def test_an_operation_that_never_ends_is_the_last_line(tmp_path: Path, alone: None) -> None:
    recorder = Recorder(tmp_path / "a.jsonl", {"world": 1})
    with pytest.raises(RuntimeError):  # in place of a hang: gloo refuses what the recorder has already written
        dist.all_gather_into_tensor(torch.empty(3), torch.ones(5))
    last = lines(tmp_path / "a.jsonl")[-1]
    recorder.close()
    assert (last["op"], last["bytes"]) == ("all_gather", 12)


def test_only_the_first_steps_are_recorded(tmp_path: Path, alone: None) -> None:
    before = wrapped()
    recorder = Recorder(tmp_path / "a.jsonl", {"world": 1})
    for number in range(1, STEPS + 3):
        with recorder.step(number):
            dist.all_reduce(torch.ones(1))
        dist.barrier()  # as an evaluation might
    assert wrapped() == before
    steps = read(tmp_path / "a.jsonl").steps
    assert list(steps) == [f"{part}step {number}" for number in range(1, STEPS + 1) for part in ("", "after ")]
    recorder.close()
