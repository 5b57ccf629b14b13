"""Traces of real runs: nothing is missing in them, no rank can wait in a circle, the formulas of bytes hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel import pool
from trainer.stages import trace, wire

Case = dict[str, Any]


def case(zero: int, accumulation: int, recompute: str = "none", dtype: str = "fp32", **more: Any) -> Case:
    """A batch of 16 over two replicas, in one micro-batch of eight or in four of two."""
    size = {1: 8, 4: 2}[accumulation]
    found = {"zero": zero, "group": size, "micro_batch": size, "recompute": recompute, "dtype": dtype, "size": 32}
    return {**found, **more}


def team(zero: int, recompute: str) -> Case:
    """BatchNorm groups over both replicas."""
    return {**case(zero, 4, recompute), "group": 4}


# By (pipeline, data). fp32 first: DeepSpeed remembers for the whole process that autocast was once switched on.
FAST: dict[tuple[int, int], dict[str, Case]] = {
    (1, 2): {
        "zero0": case(0, 4),
        "zero1-team-full": team(1, "full"),
        "zero3": case(3, 4, "full"),
        "zero3-forgetful": case(3, 1, reuse=0),
        "zero3-bf16": case(3, 4, dtype="bf16"),
    },
    (1, 4): {"zero3-shard-group": case(3, 4, "full", shard_group=2, reuse=0)},
    (2, 2): {
        "zero2": case(2, 4),
        "zero3": case(3, 4),
        "zero1-bf16": case(1, 4, "full", "bf16"),
    },
}
SLOW: dict[tuple[int, int], dict[str, Case]] = {
    mesh: {
        f"zero{zero}-{accumulation}-{recompute}-{dtype}": case(zero, accumulation, recompute, dtype)
        for dtype in ("fp32", "bf16")
        for zero in range(4)
        for accumulation in (1, 4)
        for recompute in ("none", "selective", "full")
    }
    for mesh in ((1, 1), (2, 1), (1, 2), (2, 2))
} | {(4, 1): {f"zero{zero}-{count}": case(zero, count) for zero in range(4) for count in (1, 4)}}


def cases(matrix: dict[tuple[int, int], dict[str, Case]], mesh: tuple[int, int]) -> dict[str, Case]:
    """The cases of a mesh; with one replica a micro-batch has twice the samples, for as many of them."""
    pipeline, data = mesh
    return {
        name: {
            **found,
            "pipeline": pipeline,
            **{key: found[key] * 2 // min(data, 2) for key in ("group", "micro_batch")},
        }
        for name, found in matrix[mesh].items()
    }


def traced(matrix: dict[tuple[int, int], dict[str, Case]], folder: Path) -> dict[tuple[int, int], Path]:
    """Run the cases; where the traces of each mesh lie."""
    places, jobs = {}, []
    for mesh in sorted(matrix):
        places[mesh] = place = folder / "x".join(map(str, mesh))
        place.mkdir()
        (place / "cases.json").write_text(json.dumps(cases(matrix, mesh)))
        arguments = (str(place / "cases.json"), str(place))
        jobs.append(pool.Job("trace_worker", arguments, mesh[0] * mesh[1], str(place / "logs")))
    pool.run(jobs, folder)
    return places


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Where the traces of the fast cases lie, by mesh."""
    return traced(FAST, tmp_path_factory.mktemp("traced"))


def prove(folder: Path) -> int:
    """No circle of waits in the traces of a run."""
    return trace.check({rank: found.program for rank, found in trace.load(folder / "trace").items()})


def compare(folder: Path) -> None:
    """What every rank put on the wire in the third step, beside the formulas."""
    for rank, found in trace.load(folder / "trace").items():
        share = wire.Share(**found.facts["share"])
        due = wire.expected(share)
        seen = wire.counted(found.steps["step 3"], found.facts["control"])
        assert seen.keys() == due.keys(), (folder.name, rank)
        for kind, size in due.items():
            assert seen[kind] == pytest.approx(size, rel=0.05), (folder.name, rank, kind)


def complete(folder: Path) -> None:
    """The recorder saw as many operations of each kind in the third step as torch's dispatcher."""
    kinds = {"allreduce": "all_reduce", "allgather": "all_gather", "_allgather": "all_gather", "recv": "receive"}
    kinds |= {"_reduce_scatter": "reduce_scatter"}
    for rank, found in trace.load(folder / "trace").items():
        recorded: dict[str, int] = {}
        for node in found.steps["step 3"]:
            for operation in node:
                recorded[operation.kind] = recorded.get(operation.kind, 0) + 1
        seen: dict[str, int] = {}
        for name, count in json.loads((folder / f"seen-{rank}.json").read_text()).items():
            stem = name.removesuffix("_").removesuffix("_base")
            seen[kinds.get(stem, stem)] = seen.get(kinds.get(stem, stem), 0) + count
        assert recorded == seen, (folder.name, rank)


FAST_NAMES = [(mesh, name) for mesh, found in FAST.items() for name in found]


@pytest.mark.parametrize(("mesh", "name"), FAST_NAMES)
def test_no_circle_of_waits(mesh: tuple[int, int], name: str, folders: dict[tuple[int, int], Path]) -> None:
    assert prove(folders[mesh] / name) >= 6


@pytest.mark.parametrize(("mesh", "name"), FAST_NAMES)
def test_bytes_are_those_of_the_formulas(
    mesh: tuple[int, int], name: str, folders: dict[tuple[int, int], Path]
) -> None:
    compare(folders[mesh] / name)


@pytest.mark.parametrize(("mesh", "name"), FAST_NAMES)
def test_nothing_is_missing(mesh: tuple[int, int], name: str, folders: dict[tuple[int, int], Path]) -> None:
    complete(folders[mesh] / name)


def test_a_pipeline_is_marked_in_its_order(folders: dict[tuple[int, int], Path]) -> None:
    def marks(rank: int) -> list[str]:
        lines = (folders[2, 2] / "zero2" / "trace" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
        step = lines[lines.index('{"part": "step 3"}') : lines.index('{"part": "evaluation 1"}')]
        found = [json.loads(line) for line in step if "micro" in line]
        return [f"{line['mark'][0]}{line['micro']}" for line in found]

    assert marks(0) == ["f0", "f1", "r0", "b0", "f2", "r1", "b1", "f3", "r2", "b2", "r3", "b3"]
    assert marks(2) == ["f0", "b0", "f1", "b1", "f2", "b2", "f3", "b3"]


@pytest.mark.parametrize(
    ("mesh", "name", "waits"),
    [((1, 2), "zero0", True), ((2, 2), "zero1-bf16", True), ((2, 2), "zero2", False), ((1, 2), "zero3", False)],
)
def test_below_zero2_gradients_travel_with_the_last_micro_batch_only(
    mesh: tuple[int, int], name: str, waits: bool, folders: dict[tuple[int, int], Path]
) -> None:
    lines = (folders[mesh] / name / "trace" / "rank-00000.jsonl").read_text().splitlines()
    step = [json.loads(line) for line in lines[lines.index('{"part": "step 3"}') :]]
    last = next(place for place, line in enumerate(step) if (line.get("mark"), line.get("micro")) == ("backward", 3))
    end = next(place for place, line in enumerate(step) if line.get("part", "").startswith("evaluation"))
    replicas = list(range(mesh[1]))  # of the first stage
    sums = [
        sum(line["bytes"] for line in part if line.get("ranks") == replicas and line.get("op") in wire.RING)
        for part in (step[:last], step[last:end])
    ]
    assert (sums[0] == 0) == waits
    assert sums[1] > 100_000


def test_a_trace_with_a_changed_line_is_refused(folders: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    traces = trace.load(folders[2, 2] / "zero2" / "trace")
    programs = {rank: found.program for rank, found in traces.items()}
    nodes = programs[0]
    exchange = next(number for number, node in enumerate(nodes) if len(node) == 2)
    programs[0] = [*nodes[:exchange], *((part,) for part in nodes[exchange]), *nodes[exchange + 1 :]]
    assert trace.check(programs) > 0  # the other stage still does both at once
    others = programs[2]
    matching = next(number for number, node in enumerate(others) if len(node) == 2)
    programs[2] = [*others[:matching], *((part,) for part in others[matching]), *others[matching + 1 :]]
    with pytest.raises(trace.TraceError, match=r"rank 0 waits in send .*stages/pipeline\.py:\d+"):
        trace.check(programs)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SLOW)
def test_every_mesh(mesh: tuple[int, int], tmp_path: Path) -> None:
    folder = traced({mesh: SLOW[mesh]}, tmp_path)[mesh]
    for name in SLOW[mesh]:
        if mesh != (1, 1):  # a rank alone has nobody to wait for
            prove(folder / name)
        compare(folder / name)
        complete(folder / name)
