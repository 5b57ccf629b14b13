"""Which rank hangs, and in which collective the others wait for it: read from what all ranks wrote on SIGUSR1.

A rank's answer is its stacks and the newest operations of its process groups (`trainer/health/pulse.py`). All ranks
issue the same operations in the same order, so whoever is behind has none that is not over: it is the one that the
others wait for. A rank that gives its stacks and no operations holds Python's lock, in a driver call for instance;
then, and where nothing tells of operations, the stacks decide: who waits stands inside a call of torch.distributed.
Python 3.9 and the standard library only.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

# Faulthandler marks the thread that took the signal, else the one that runs Python, as the current one.
_THREAD = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_WAITING = ("torch/distributed/", "deepspeed/comm/")
_MARK = "collectives: "


@dataclass(frozen=True)
class Answer:
    """What one rank said.

    Attributes:
        frames: the main thread, innermost call first: (file, line, function); empty for a rank that said nothing.
        pending: its operations that are not over, in words; None for a rank that told of none.
        newest: the number of its newest operation in each group.
    """

    frames: tuple[tuple[str, int, str], ...] = ()
    pending: tuple[str, ...] | None = None
    newest: tuple[tuple[str, int], ...] = ()

    @property
    def call(self) -> str:
        """The call of torch.distributed that its main thread stands in, empty for none."""
        for number, (file, _, name) in enumerate(self.frames[:4]):
            if any(part in file for part in _WAITING):
                inside = [n for f, _, n in self.frames[number:] if any(part in f for part in _WAITING)]
                outer = [n for n in inside if n != "wrapper"]
                return outer[-1] if outer else name
        return ""

    @property
    def place(self) -> str:
        """Where its main thread is, as `file:line function`."""
        if not self.frames:
            return "an unknown place"
        file, line, name = self.frames[0]
        return f"{'/'.join(file.rsplit('/', 2)[-2:])}:{line} {name}"

    @property
    def waits(self) -> bool:
        """Whether it waits for another rank."""
        return bool(self.call) if self.pending is None else bool(self.pending)


@dataclass(frozen=True)
class Hang:
    """Who hangs.

    Attributes:
        ranks: those that the others wait for; empty where all wait.
        collectives: what the others wait in.
        text: a sentence.
    """

    ranks: tuple[int, ...]
    collectives: tuple[str, ...]
    text: str


def read(text: str) -> Answer:
    """The newest answer in a log; faulthandler writes the main thread last."""
    answer = Answer()
    frames: list[tuple[str, int, str]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            frames, answer = [], Answer()
        found = _FRAME.match(line)
        if found:
            frames.append((found["file"], int(found["line"]), found["name"]))
        mark = line.find(_MARK)
        if mark >= 0:
            answer = _operations(line[mark + len(_MARK) :])
    return replace(answer, frames=tuple(frames))


def _operations(text: str) -> Answer:
    """What a rank told of its operations; nothing where it cannot be read, or there were none at all."""
    pending, newest = [], {}
    try:
        for entry in json.loads(text):
            newest[str(entry["group"])] = int(entry["number"])
            if not entry["over"]:
                shape = " ".join(map(str, [*entry["types"], *entry["sizes"]]))
                pending.append(f"{entry['name']} {entry['number']} of group {entry['group']}, {shape}".rstrip(", "))
    except (ValueError, KeyError, TypeError):
        return Answer()
    return Answer(pending=tuple(pending) if newest else None, newest=tuple(newest.items()))


def _behind(answers: dict[int, Answer]) -> list[int]:
    """Ranks that have not issued what others of a group have."""
    front: dict[str, int] = {}
    for answer in answers.values():
        for group, number in answer.newest:
            front[group] = max(front.get(group, 0), number)
    return [rank for rank, answer in answers.items() if any(number < front[group] for group, number in answer.newest)]


def culprit(dumps: dict[int, str], hosts: dict[int, str] | None = None) -> Hang:
    """Which ranks hang and where the others wait.

    Args:
        dumps: what each rank wrote when it was asked.
        hosts: of the ranks, to name them.
    """
    answers = {rank: read(text) for rank, text in sorted(dumps.items())}
    telling = any(answer.pending for answer in answers.values())
    # Where others tell of operations, who tells of none holds Python's lock, whatever it was at: waiting gives it back.
    waiting = [rank for rank, answer in answers.items() if answer.waits and not (telling and answer.pending is None)]
    others = [rank for rank in answers if rank not in waiting]
    others = others or _behind(answers)
    named = {rank: f"rank {rank}{f' on {hosts[rank]}' if hosts and rank in hosts else ''}" for rank in answers}
    parts = []
    for rank in others[:4]:
        answer = answers[rank]
        told = f"hangs in {answer.place}" if answer.frames else "gave no stack"
        parts.append(f"{named[rank]} {told}")
    if len(others) > 4:
        parts.append(f"so do {len(others) - 4} others")
    calls = tuple(sorted({word for rank in waiting for word in answers[rank].pending or (answers[rank].call,)}))
    if waiting:
        parts.append(f"{len(waiting)} of {len(answers)} ranks wait in {'; '.join(calls[:4])}")
    if waiting and not others:
        parts.append("none is behind: the network or a device is stuck")
    return Hang(tuple(others), calls, "; ".join(parts) or "no rank gave a stack")
