"""`--profile`: what real ranks write about some of their steps, and what is made of a trace's allocations."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from trainer.bench import allocations, profiling
from trainer.bench import step as bench_step
from trainer.launch import rank_environment, with_rooms
from trainer.stages import partition

FIRST, LAST = 2, 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bench_step.Observation:
    """Two stages of a small network in training, a block of it made again."""
    run = resolve.load("demo-digits")
    run = replace(
        run, model=replace(run.model, resolution=32), cluster=replace(run.cluster, device="cpu"),
        parallel=replace(run.parallel, pipeline=2, zero=1, micro_batch=4, recompute="selective"),
    )  # fmt: skip
    run = replace(bench_step.training(run, 2, 8, 4), profile=f"{FIRST - 1}:{LAST}", steps=LAST + 1)
    return bench_step.observe(run, tmp_path_factory.mktemp("runs") / "profiled")


def folder_of(found: bench_step.Observation) -> Path:
    return Path(found.run.folder) / profiling.FOLDER


def test_every_rank_times_its_blocks(trained: bench_step.Observation) -> None:
    cut = partition.stages(trained.run, 1000, 4)
    for rank, content in enumerate(trained.ranks):
        assert content["rank"] == rank
        assert tuple(content["blocks"]) == cut[rank].blocks
        assert [int(number) for number in content["steps"]] == list(range(FIRST, LAST + 1))
        assert content["traced"] == [LAST - 1, LAST]
        assert len(trained.steps(rank, 0)) == LAST - FIRST - 1
        passes = trained.plan.accumulation
        in_blocks = passes * sum(map(sum, content["blocks"].values()))
        assert all(forward > 0 and backward > 0 for forward, backward in content["blocks"].values())
        assert 0 < in_blocks < max(trained.steps(rank, 1))  # most of the thread's time, and not more
        assert content["roofline"].keys() == content["blocks"].keys()
        assert content["peak_bytes"] > 100_000_000


def test_without_a_trace_every_step_counts(tmp_path: Path) -> None:
    run = resolve.load("demo-digits")
    run = replace(
        run, model=replace(run.model, resolution=32), cluster=replace(run.cluster, device="cpu"),
        parallel=replace(run.parallel, micro_batch=4),
    )  # fmt: skip
    run = replace(bench_step.training(run, 1, 4, 4), profile="1:4", profile_trace=False, steps=5)
    found = bench_step.observe(run, tmp_path / "profiled")
    assert found.ranks[0]["traced"] == []
    assert len(found.steps(0, 0)) == 3
    assert sorted(path.name for path in folder_of(found).iterdir()) == ["blocks.txt", "rank-00000.json"]


def test_the_first_rank_writes_a_table_and_each_stage_a_trace(trained: bench_step.Observation) -> None:
    folder = folder_of(trained)
    table = (folder / "blocks.txt").read_text()
    for name in trained.ranks[0]["blocks"]:
        assert f"\n{name} " in table
    assert "roofline" in table
    for rank in range(2):
        events = json.loads((folder / f"trace-rank-{rank:05d}.json").read_text())["traceEvents"]
        names = {event.get("name") for event in events}
        assert {"aten::mkldnn_convolution" if rank == 0 else "aten::addmm", "[memory]"} <= names
        memory = json.loads((folder / f"memory-rank-{rank:05d}.json").read_text())
        assert memory["allocated_peak_bytes"] > 100_000
        assert sum(memory["alive_then"].values()) <= memory["allocated_peak_bytes"] * 1.5
        assert memory["process_peak_bytes"] > memory["allocated_peak_bytes"]


def test_the_run_foretold_its_step(trained: bench_step.Observation) -> None:
    lines = (Path(trained.run.folder) / "events" / "rank-00000.jsonl").read_text().splitlines()
    told = next(event for event in map(json.loads, lines) if event["event"] == "predicted")
    assert told["step_seconds"] > 0
    assert "assumed" in told["rates"] or "measured" in told["rates"]
    assert 0 < told["base"] < trained.ranks[0]["peak_bytes"]


@pytest.mark.parametrize("words", ["20", "5:5", "9:3", "a:b", ":5", "-1:3"])
def test_steps_that_are_none_are_refused(words: str) -> None:
    with pytest.raises(InputError, match="profile = "):
        Run(profile=words)


def event(name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": 1}


def memory(ts: float, address: int, size: int, device: int = 0) -> dict[str, Any]:
    args = {"Addr": address, "Bytes": size, "Device Type": device}
    return {"ph": "i", "name": "[memory]", "ts": ts, "args": args}


def test_allocations_are_added_up_to_their_peak(tmp_path: Path) -> None:
    """An address is used again; what was there before the trace is given back; a GPU's are another's."""
    events = [
        event("outer", 0, 10), event("inner", 1, 3), memory(2, 1, 100), memory(3, 2, 50), memory(5, 1, -100),
        memory(6, 1, 30), memory(7, 9, -1000), memory(8, 3, 10_000, device=1), event("late", 20, 2), memory(21, 4, 60),
    ]  # fmt: skip
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = allocations.summary(tmp_path / "trace.json")
    assert found["allocated_peak_bytes"] == 150
    assert found["alive_then"] == {"outer > inner": 150}
    assert found["allocations"] == 6


def test_a_run_that_goes_on_among_the_steps_profiles_those_that_are_left(tmp_path: Path) -> None:
    """As after a resume: the window begins before the first step that this process makes."""
    run = resolve.load("demo-digits")
    run = replace(
        run, model=replace(run.model, resolution=32), cluster=replace(run.cluster, device="cpu"),
        parallel=replace(run.parallel, micro_batch=4),
    )  # fmt: skip
    run = replace(bench_step.training(run, 1, 4, 4), profile="1:4", steps=5)
    script = (
        "import sys; from trainer.bench import profiling; profiling.wanted = lambda run: (-2, 3); "
        "from trainer import train; train.main(sys.argv[1:])"
    )

    def start(words: list[str], world: int, logs: Path, port: int, on_cpu: bool) -> int:
        environment = rank_environment(world, port, on_cpu, with_rooms()) | {"RANK": "0", "LOCAL_RANK": "0"}
        return subprocess.run([sys.executable, "-c", script, words[-1]], env=environment, check=False).returncode

    found = bench_step.observe(run, tmp_path / "profiled", start=start)
    assert list(found.ranks[0]["steps"]) == ["1", "2", "3"]
    assert found.ranks[0]["traced"] == [2, 3]
    assert all(seconds > 0 for pair in found.ranks[0]["blocks"].values() for seconds in pair)
    assert (folder_of(found) / "trace-rank-00000.json").exists()
