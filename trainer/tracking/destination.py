"""What the destinations of a run's figures share: its lines, and how far each destination has got."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

SYSTEM = "system"  # folder of the run's: a file of each machine, as `trainer.machine.watch` writes it


class Mark(NamedTuple):
    """A place between two lines of `metrics.jsonl`."""

    offset: int = 0  # bytes before it
    lines: int = 0  # lines before it


@dataclass(frozen=True)
class Line:
    """One line of `metrics.jsonl`."""

    number: int  # 0-based
    step: int  # updates made
    time: float  # seconds since the epoch
    values: dict[str, float]


class Destination(Protocol):
    """One place that a run's lines are carried to. It is opened with the run's folder, the run, and its position.

    Attributes:
        start: from where it wants the lines.
    """

    start: Mark

    def take(self, lines: Sequence[Line], upto: Mark) -> None:
        """Take the lines before `upto`; once they are safe, the position says so."""

    def finish(self, upto: Mark) -> None:
        """Take what belongs to the end of a session; everything before `upto` is safe when this returns."""


@runtime_checkable
class SystemDestination(Destination, Protocol):
    """One that also takes what the machines of a run write about themselves (`trainer.machine.watch`)."""

    def take_system(self, host: str, lines: Sequence[Line], marks: dict[str, Mark]) -> None:
        """Take new lines of a machine's file; once they are safe, the position says so with `marks`."""


class Position:
    """How far one destination has got, in `carried/<name>.json` of the run folder; replaced whole, never half written.

    Attributes:
        mark: all lines before it are in the destination for good.
        finished: size of metrics.jsonl, in bytes, when the destination last had all of it and was closed.
        own: what the destination must know when it is opened again.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / "carried" / f"{name}.json"
        state = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.mark = Mark(*state.get("mark", ()))
        self.finished: int = state.get("finished", -1)
        self.own: dict[str, Any] = state.get("own", {})

    def save(self, mark: Mark, **facts: Any) -> None:
        """Everything before `mark` is safe; remember `facts` besides."""
        self.mark, self.own = mark, self.own | facts
        self._write()

    def finish(self) -> None:
        """The destination was closed with everything before `mark`."""
        self.finished = self.mark.offset
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        aside = self._file.with_suffix(".tmp")
        aside.write_text(json.dumps({"mark": self.mark, "finished": self.finished, "own": self.own}))
        os.replace(aside, self._file)


def unread(metrics: Path, mark: Mark) -> tuple[list[Line], Mark]:
    """The whole lines of `metrics` behind `mark`, and the mark behind them; a line still being written waits.

    What a full disk or a kill has left of a line is passed over, and counts as one.
    """
    if not metrics.exists():
        return [], mark
    with metrics.open("rb") as file:
        file.seek(mark.offset)
        rest = file.read()
    whole = rest[: rest.rfind(b"\n") + 1]
    lines = []
    for number, text in enumerate(whole.splitlines(), start=mark.lines):
        try:
            values = json.loads(text)
            step, time = values.pop("step"), values.pop("time")
        except (ValueError, KeyError, AttributeError):
            continue
        lines.append(Line(number, step, time, values))
    return lines, Mark(mark.offset + len(whole), mark.lines + len(whole.splitlines()))
