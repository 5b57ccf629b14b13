"""What a run's folder tells: its figures, events, cost and examples, read once for every part of the page."""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from trainer.cost import bill
from trainer.cost.bill import Bill
from trainer.health import goodput
from trainer.tracking import data_card, track
from trainer.tracking.destination import SYSTEM, Line, Mark, unread

HOUR = 3600.0
STOPPED = 75  # exit code of ranks that were asked to stop and have saved
SILENT = 120.0  # seconds without a word after which a run that has not ended counts as broken off
Points = list[tuple[float, float]]
OWN = ("name", "runs", "recipe")  # settings in which every run differs from its recipe


@dataclass(frozen=True)
class Facts:
    """One run's folder.

    Attributes:
        lines: of metrics.jsonl, all attempts' in the order of time.
        events: the first rank's and the supervisor's, in the order of time.
        bill: None where nothing was held yet.
        data: of `trainer.tracking.data_card`; None in folders of older releases.
        scores: of the last evaluation, with its step.
        examples: of `trainer.evaluation.examples`.
    """

    folder: Path
    run: Run
    lines: list[Line]
    events: list[dict[str, Any]]
    bill: Bill | None
    data: dict[str, Any] | None
    environment: dict[str, Any]
    scores: dict[str, float]
    examples: dict[str, Any] | None
    bad_samples: list[dict[str, Any]]
    machines: dict[str, list[Line]]
    clock: dict[str, Any] | None

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def began(self) -> float:
        """Unix time of the first start."""
        if self.clock is not None:
            return float(self.clock["began"]) / goodput.NS
        return min((float(event["time"]) for event in self.events), default=0.0)

    @property
    def step(self) -> int:
        """Updates that the run has, by the last line written down: a rollback takes some back."""
        return self.lines[-1].step if self.lines else 0

    def hours(self, when: float) -> float:
        """Hours since the first start."""
        return (when - self.began) / HOUR

    def over_steps(self, key: str) -> Points:
        """A figure by step; of a step that was made again, the last."""
        found: Points = []
        for line in self.lines:
            if key in line.values:
                while found and found[-1][0] >= line.step:
                    found.pop()
                found.append((float(line.step), line.values[key]))
        return found

    def over_time(self, key: str) -> Points:
        """A figure by hours since the first start, also of what was made again; a NaN between two attempts."""
        starts = [float(event["time"]) for event in self.of_kind("resume", "start")][1:]
        found: Points = []
        for line in self.lines:
            if key in line.values:
                while starts and starts[0] <= line.time:
                    found.append((self.hours(starts.pop(0)), math.nan))
                found.append((self.hours(line.time), line.values[key]))
        return found

    def last(self, key: str) -> float | None:
        """The last value of a figure."""
        return next((line.values[key] for line in reversed(self.lines) if key in line.values), None)

    def typical(self, key: str) -> float | None:
        """The median of a figure."""
        values = [line.values[key] for line in self.lines if key in line.values]
        return statistics.median(values) if values else None

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds."""
        return [event for event in self.events if event.get("event") in kinds]

    def changes(self) -> list[tuple[str, Any, Any]] | None:
        """Settings that differ from the recipe: (field, recipe, run); None where the recipe is not one of ours."""
        if self.run.recipe not in resolve.RECIPES:
            return None
        return [row for row in resolve.diff(resolve.load(self.run.recipe), self.run) if row[0] not in OWN]

    def status(self) -> str:
        """In a few words."""
        if (self.folder / "done").exists():
            return f"finished after {self.step:,} steps"
        last = self.of_kind("stop", "diverged", "end", "start", "resume")
        kind = last[-1]["event"] if last else ""
        if kind == "stop":
            return f"stopped on request at step {self.step:,}"
        if kind == "diverged":
            return f"diverged at step {self.step:,}"
        if kind == "end":
            return f"a check of {self.step:,} steps"
        heard = float(self.clock["time"]) if self.clock is not None else 0.0
        if time.time() - heard > SILENT:
            return f"broke off at step {self.step:,}"
        return f"runs, at step {self.step:,}"


@dataclass(frozen=True)
class Unit:
    """The unit of an axis over time, so that its numbers are round."""

    per_hour: float
    label: str

    def points(self, facts: Facts, key: str) -> Points:
        """A figure by this unit of time."""
        return [(hours * self.per_hour, value) for hours, value in facts.over_time(key)]


def clock_of(given: Sequence[Facts]) -> Unit:
    """The unit for runs of their length."""
    longest = max((facts.hours(facts.lines[-1].time) for facts in given if facts.lines), default=0.0)
    for limit, per_hour, name in ((1 / 15, HOUR, "seconds"), (4.0, 60.0, "minutes"), (96.0, 1.0, "hours")):
        if longest < limit:
            return Unit(per_hour, f"{name} since the first start")
    return Unit(1 / 24, "days since the first start")


def facts(folder: Path) -> Facts:
    """Read a run's folder.

    Raises:
        InputError: it is none, or one of its files cannot be read.
    """
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: not a run folder (it has no run.json); `coatnet train` makes them under runs/")
    try:
        scores = _json(folder / "evaluation.json") or {}
        lost = folder / "bad-samples.jsonl"
        return Facts(
            folder=folder,
            run=resolve.recorded(folder / "run.json"),
            lines=unread(folder / "metrics.jsonl", Mark())[0],
            events=sorted([*track.events(folder), *supervised(folder)], key=lambda event: float(event["time"])),
            bill=_bill(folder),
            data=data_card.read(folder),
            environment=_json(folder / "environment.json") or {},
            scores=scores,
            examples=_json(folder / track.EXAMPLES),
            bad_samples=_whole(lost),
            machines={file.stem: unread(file, Mark())[0] for file in sorted((folder / SYSTEM).glob("*.jsonl"))},
            clock=goodput.last_line(folder / "events" / goodput.FILE),
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: cannot be read as a run's folder: {error!r}") from error


def supervised(folder: Path) -> list[dict[str, Any]]:
    """The events of the supervisor that started the ranks, without its plain endings."""
    return [event for event in _whole(folder / "events" / "agent.jsonl") if not _plain_end(event)]


def _plain_end(event: dict[str, Any]) -> bool:
    """Whether a try ended as it should: done, or stopped on request."""
    return event.get("event") == "ended" and event.get("code") in (0, STOPPED) and not event.get("hung")


def _whole(path: Path) -> list[Any]:
    """The whole lines of a file of JSON lines; what a kill has left of others is passed over."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _bill(folder: Path) -> Bill | None:
    """The bill, None where nothing was held yet."""
    try:
        return bill.of_path(folder)
    except InputError:
        return None


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None if the file is not there."""
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found
