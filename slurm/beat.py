"""Signs of life: one small file per node and try, written by a rank of that node, read by the supervisor.

A file is `heartbeat/TRY/HOST.json` in the run's folder: {"time", "moves", "step", "phase", "longest"}; it is written
by `trainer/health/pulse.py`. `moves` grows with every step and every batch, so a thread that merely lives is no sign of
life. Another rank of the node has a file of its own, HOST~RANK.json, while it waits for something that may take long:
then those who wait for it have as much time. Python 3.9 and the standard library only.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

# What hangs is to be named within 60 s, or 5 times the 99th percentile step: 45 s and 4 times leave room for looking,
# and for the stacks.
LEAST = 45.0
FACTOR = 4.0


@dataclass(frozen=True)
class Beat:
    """What a node last told.

    Attributes:
        host: the node.
        moves: how often something went on there.
        step: updates made.
        phase: what it is at: start, train, data (it waits for a batch), save, evaluate.
        longest: seconds of the 99th percentile step.
    """

    host: str
    moves: int
    step: int
    phase: str
    longest: float


def folder(run: str | os.PathLike[str], name: str) -> Path:
    """Where the files of a try lie."""
    return Path(run) / "heartbeat" / name


def scan(path: Path) -> dict[str, Beat]:
    """The newest beat of every node, by host. A file that is being written or damaged counts as not there."""
    found = {}
    try:
        entries = list(os.scandir(path))
    except OSError:
        return {}
    for entry in entries:
        if entry.name.endswith(".json"):
            beat = _read(entry.path, entry.name[:-5])
            if beat is not None:
                found[beat.host] = beat
    return found


def _read(path: str, host: str) -> Beat | None:
    """One file."""
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
        return Beat(host, int(told["moves"]), int(told["step"]), str(told["phase"]), float(told["longest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Watch:
    """Whether the nodes of a try still move.

    Attributes:
        step: the furthest update that any node told of.
    """

    def __init__(self, path: Path, first: float, least: float, slow: float) -> None:
        """Begin to watch.

        Args:
            path: the files' folder.
            first: seconds without a move that are allowed until the first steps are made.
            least: the same between steps, at least.
            slow: the same while some rank waits for data, saves or evaluates.
        """
        self._path, self._first, self._least, self._slow = path, first, least, slow
        self._began = time.monotonic()
        self._moves: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self.step = 0

    def look(self) -> str:
        """Read the files; what is wrong, or nothing."""
        now = time.monotonic()
        beats = scan(self._path)
        for host, beat in beats.items():
            self.step = max(self.step, beat.step)
            if "~" not in host and self._moves.get(host) != beat.moves:
                self._moves[host], self._since[host] = beat.moves, now
        if not any(self._moves.values()):
            late = now - self._began > self._first
            return f"no step within {self._first:.0f} s of the start" if late else ""
        limit = self._limit(list(beats.values()))
        stuck = sorted(host for host, since in self._since.items() if now - since > limit)
        if not stuck:
            return ""
        phases = ", ".join(f"{host} at {beats[host].phase}" for host in stuck if host in beats)
        return f"nothing moved for {limit:.0f} s on {phases or ', '.join(stuck)}"

    def _limit(self, beats: list[Beat]) -> float:
        """Seconds without a move that are allowed now."""
        limit = max(self._least, FACTOR * max(beat.longest for beat in beats)) if beats else self._least
        phases = {beat.phase for beat in beats}
        if "start" in phases:
            return max(limit, self._first)  # compilation and first data come unevenly
        return limit if phases <= {"train"} else max(limit, self._slow)
