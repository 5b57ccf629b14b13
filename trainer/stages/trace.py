"""Proves from what the ranks of a run did with their process groups that they cannot wait for each other for ever.

`trainer/stages/recorder.py` writes the traces, one file of JSON lines a rank; the steps of `trainer.stages.schedule`
are traces too. The proof: every collective is reached by all ranks of its group in the same order with the same kind
and content, every transfer has its other end, and a run in which every operation blocks comes to its end. Nothing is
buffered there: an operation lasts until all ranks that take part in it have reached it, a batch of transfers is one
operation, and a rank begins nothing before what it issued earlier has ended, whatever the process group.

A real run waits for less: nccl orders the operations of one communicator only, the device's queue waits and not the
process, and gloo buffers small messages. Whoever waits in it waits there too, so that a circle of waits that it can
run into is found here. What is refused here may come through by luck. No torch.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, zip_longest
from pathlib import Path
from typing import Any

from configs.errors import InputError
from trainer.stages.schedule import Compute, Step

PIPE = "pipe"  # the process group of a schedule


class TraceError(InputError):
    """Ranks that could wait for ever, or a trace that proves nothing."""


@dataclass(frozen=True)
class Operation:
    """What one rank does with one process group.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, broadcast, reduce, gather, scatter, all_to_all, barrier; send,
            receive.
        group: the process group's name, the same on all its ranks.
        ranks: of the group.
        peer: the other end of a transfer, a rank of the whole run; None for a collective.
        content: what must be the same at both ends, or on all ranks of a collective.
        place: where in the trace and in the program.
        bytes: of the whole tensor: the input of a reduce_scatter, the output of an all_gather.
        dtype: as torch prints it, without "torch."; "" for a barrier.
        blocking: whether the program waited for the end at once.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    peer: int | None
    content: str
    place: str
    bytes: int = 0
    dtype: str = ""
    blocking: bool = True

    def __str__(self) -> str:
        """For a person, in an error."""
        end = "" if self.peer is None else f" {'to' if self.kind == 'send' else 'from'} rank {self.peer}"
        content = f" of {self.content}" if self.content else ""
        return f"{self.kind}{content}{end} in group {self.group} {list(self.ranks)} ({self.place})"


Node = tuple[Operation, ...]  # one collective, or the transfers of a batch
Program = list[Node]  # of one rank, in the order of issue
At = tuple[int, int]  # a rank, and the number of a node in its program


@dataclass(frozen=True)
class Recorded:
    """One rank's trace.

    Attributes:
        facts: the first line: rank, world, backend, the control group's name, and "share", a `wire.Share`.
        steps: what was done, by the part of the run: "step 1", "after step 1", where it logs, saves, evaluates.
    """

    facts: dict[str, Any]
    steps: dict[str, Program]

    @property
    def program(self) -> Program:
        """All of it."""
        return [node for nodes in self.steps.values() for node in nodes]


def check(programs: Mapping[int, Program]) -> int:
    """Prove that the ranks cannot wait in a circle.

    Args:
        programs: of every rank.

    Returns:
        Collectives and transfers that were matched.

    Raises:
        TraceError: ranks disagree about a collective, a transfer has one end, or ranks wait for each other.
    """
    partners: dict[At, list[At]] = defaultdict(list)
    matched = 0
    for meeting in _meetings(programs):
        matched += 1
        for mine in meeting:
            partners[mine] += [other for other in meeting if other != mine]
    here = dict.fromkeys(programs, 0)
    while waiting := [rank for rank in programs if here[rank] < len(programs[rank])]:
        moved = [_advance(rank, here, programs[rank], partners) for rank in waiting]
        if not any(moved):
            raise TraceError(_circle(here, programs, partners))
    return matched


def _advance(rank: int, here: dict[int, int], program: Program, partners: Mapping[At, list[At]]) -> bool:
    """Let a rank go on as far as it can; whether it could."""
    began = here[rank]
    while here[rank] < len(program):
        if any(here[other] < place for other, place in partners.get((rank, here[rank]), ())):
            break
        here[rank] += 1
    return here[rank] > began


def _circle(here: Mapping[int, int], programs: Mapping[int, Program], partners: Mapping[At, list[At]]) -> str:
    """Who waits for whom where nobody can go on."""
    rank = min(rank for rank in programs if here[rank] < len(programs[rank]))
    road: list[int] = []
    while rank not in road:
        road.append(rank)
        rank = next(other for other, place in partners[rank, here[rank]] if here[other] < place)
    circle = road[road.index(rank) :]
    lines = ["the ranks could wait for each other for ever, where every operation blocks:"]
    for rank in circle:
        other, place = next((other, place) for other, place in partners[rank, here[rank]] if here[other] < place)
        wanted = " and ".join(map(str, programs[other][place]))
        lines.append(f"rank {rank} waits in {' and '.join(map(str, programs[rank][here[rank]]))}")
        lines.append(f"  for rank {other}, which comes later to its {wanted}")
    return "\n".join(lines)


def _meetings(programs: Mapping[int, Program]) -> Iterator[list[At]]:
    """The nodes that must be reached together, for every collective and every transfer.

    Raises:
        TraceError: one that the others do not know.
    """
    calls: dict[str, dict[int, list[tuple[At, Operation]]]] = defaultdict(lambda: defaultdict(list))
    ends: dict[tuple[str, int, int], tuple[list[tuple[At, Operation]], list[tuple[At, Operation]]]]
    ends = defaultdict(lambda: ([], []))
    for rank, program in programs.items():
        for number, node in enumerate(program):
            for operation in node:
                found = ((rank, number), operation)
                _refuse_strangers(rank, operation, programs)
                if operation.kind == "send":
                    ends[operation.group, rank, _peer(rank, operation)][0].append(found)
                elif operation.kind == "receive":
                    ends[operation.group, _peer(rank, operation), rank][1].append(found)
                else:
                    calls[operation.group][rank].append(found)
    for by_rank in calls.values():
        yield from _collectives(by_rank)
    for (_, source, target), (sends, receives) in ends.items():
        yield from _transfers(source, target, sends, receives)


def _refuse_strangers(rank: int, operation: Operation, programs: Mapping[int, Program]) -> None:
    """Refuse an operation with ranks of which nothing is known, or of a group that its own rank is not in."""
    peer = () if operation.peer is None else (operation.peer,)
    strangers = {*operation.ranks, *peer} - programs.keys()
    if strangers:
        raise TraceError(f"rank {rank}: {operation}: there is no trace of rank {min(strangers)}")
    if not {rank, *peer} <= set(operation.ranks):
        raise TraceError(f"rank {rank}: {operation}: between ranks that are not in the group")


def _peer(rank: int, operation: Operation) -> int:
    """The other end of a transfer."""
    if operation.peer is None or operation.peer == rank:
        raise TraceError(f"rank {rank}: {operation}: the other end must be one other rank to prove anything")
    return operation.peer


def _collectives(by_rank: Mapping[int, list[tuple[At, Operation]]]) -> Iterator[list[At]]:
    """The collectives of one group, the first of every rank with each other, and so on."""
    _, sample = next(iter(by_rank.values()))[0]
    for found in zip_longest(*(by_rank.get(rank, []) for rank in sample.ranks)):
        first_rank, first = next((at[0], operation) for at, operation in filter(None, found))
        for rank, entry in zip(sample.ranks, found, strict=True):
            if entry is None:
                raise TraceError(f"rank {first_rank}: {first}: rank {rank} never comes to it")
            if (entry[1].kind, entry[1].content, entry[1].ranks) != (first.kind, first.content, first.ranks):
                raise TraceError(f"rank {first_rank}: {first}\nmeets rank {rank}: {entry[1]}")
        yield [at for at, _ in filter(None, found)]


def _transfers(
    source: int, target: int, sends: list[tuple[At, Operation]], receives: list[tuple[At, Operation]]
) -> Iterator[list[At]]:
    """The transfers from one rank to another in one group, in order."""
    for sent, received in zip_longest(sends, receives):
        if received is None:
            raise TraceError(f"rank {source}: {sent[1]}: rank {target} never receives it")
        if sent is None:
            raise TraceError(f"rank {target}: {received[1]}: rank {source} never sends it")
        if sent[1].content != received[1].content:
            raise TraceError(f"rank {source}: {sent[1]}\nmeets rank {target}: {received[1]}")
        yield [sent[0], received[0]]


def of_schedules(schedules: Sequence[Sequence[Step]]) -> dict[int, Program]:
    """The programs of a pipeline's stages, each of one rank, from the steps of each."""
    ranks = tuple(range(len(schedules)))
    return {
        stage: [
            tuple(
                Operation(part.kind, PIPE, ranks, part.peer, f"{part.what} {part.micro}", f"step {number} of the stage")
                for part in step
            )
            for number, step in enumerate(steps)
            if not isinstance(step, Compute)
        ]
        for stage, steps in enumerate(schedules)
    }


def load(folder: Path) -> dict[int, Recorded]:
    """The traces of all ranks of a run, by rank.

    Args:
        folder: `runs/NAME/trace`.

    Raises:
        TraceError: there are none, one is missing, or one is not such a file.
    """
    files = sorted(folder.glob("rank-*.jsonl"))
    if not files:
        raise TraceError(f"{folder}: no traces; run a few steps with --parallel.trace")
    traces = {}
    for path in files:
        found = read(path)
        traces[int(found.facts["rank"])] = found
    world = max(int(found.facts["world"]) for found in traces.values())
    missing = sorted(set(range(world)) - traces.keys())
    if missing or len(traces) > world:
        raise TraceError(f"{folder}: has ranks {sorted(traces)} of a run of {world}; delete the folder and run again")
    return traces


def read(path: Path) -> Recorded:
    """One rank's trace.

    Raises:
        TraceError: the file is not one, or a crash cut it off.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise TraceError(f"{path}:{number}: cut off or damaged ({error.msg}); run the steps again") from error
    if not lines or "world" not in lines[0]:
        raise TraceError(f"{path}: the first line does not describe the run; run the steps again")
    blocking = _waited_at_once(lines)
    steps: dict[str, Program] = {}
    part = "step"
    for _, group in groupby(enumerate(lines), key=_batched()):
        nodes = [(number, line) for number, line in group]
        for _, line in nodes:
            if "part" in line:
                part = str(line["part"])
        found = tuple(_operation(path, number, line, number in blocking) for number, line in nodes if "op" in line)
        if found:
            steps.setdefault(part, []).append(found)
    return Recorded(lines[0], steps)


def _batched() -> Callable[[tuple[int, dict[str, Any]]], tuple[str, int]]:
    """A key that is the same for the lines of one batch only."""
    return lambda pair: ("batch", pair[1]["batch"]) if pair[1].get("batch") is not None else ("line", pair[0])


def _waited_at_once(lines: Sequence[Mapping[str, Any]]) -> set[int]:
    """Numbers of the lines with an operation whose wait is the next line."""
    return {
        number
        for number, (line, after) in enumerate(pairwise(lines))
        if "op" in line and line["n"] in after.get("wait", [])
    }


def _operation(path: Path, number: int, line: Mapping[str, Any], blocking: bool) -> Operation:
    """An operation from its line; `number` counts from 0."""
    if line["op"] == "barrier":
        content = ""
    else:
        more = "".join(f", {key} {line[key]}" for key in ("reduce", "root") if key in line)
        content = f"{line['bytes']:,} bytes of {line['dtype']}{more}"
    return Operation(
        kind=line["op"],
        group=line["group"],
        ranks=tuple(line["ranks"]),
        peer=line.get("peer"),
        content=content,
        place=f"{path.name}:{number + 1}, {line['place']}",
        bytes=line["bytes"],
        dtype=line["dtype"],
        blocking=blocking,
    )
