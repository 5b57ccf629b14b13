"""One run under a fault, as `coatnet drill` watches it from outside: its processes, its files, its figures."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.launch import LAUNCHER_SETS, with_rooms
from trainer.tracking.journal import whole_lines

LIMIT = 300.0  # seconds that anything may take


class DrillError(Exception):
    """The run did not do what it should; the message says what."""


@dataclass
class Scene:
    """One run under a fault.

    Attributes:
        folder: the run's.
        data: its own copy of the data set.
        harm: what is put into its ranks, `sabotage.Harm`; None: they are those of any run, which note nothing.
        mend: what has to be undone before the run can go on.
    """

    folder: Path
    data: Path
    words: list[str]
    harm: Mapping[str, Any] | None = None
    process: "subprocess.Popen[bytes] | None" = None
    mend: Callable[[], object] = lambda: None
    notes: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Start the command."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            module = ["trainer.health.sabotage", json.dumps(self.harm)] if self.harm is not None else ["trainer.cli"]
            command = [sys.executable, "-m", *module, "train", "demo-digits", *self.words]
            environment = {name: value for name, value in with_rooms().items() if name not in LAUNCHER_SETS}
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def family(self) -> list[int]:
        """Process ids of the command and all that it started."""
        assert self.process is not None
        return [] if self.process.poll() is not None else list(_descendants(self.process.pid))

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        assert self.process is not None
        found = [(_rank(pid), pid) for pid in _children(self.process.pid)]
        return [pid for rank, pid in sorted(found) if rank >= 0]

    def until(self, there: Callable[[], Any], what: str, running: bool = True) -> Any:
        """Wait for something; its value.

        Raises:
            DrillError: it did not come, or the run ended before.
        """
        deadline = time.monotonic() + LIMIT
        while not (value := there()):
            if running and self.process is not None and self.process.poll() is not None and not there():
                raise DrillError(f"the run ended with {self.process.returncode} before {what}")
            if time.monotonic() > deadline:
                raise DrillError(f"{what}: not within {LIMIT:.0f} s")
            time.sleep(0.02)
        return value

    def end(self) -> int:
        """Wait for the command's end; its exit code."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=LIMIT)
        raise DrillError(f"the run did not end within {LIMIT:.0f} s")

    def rows(self) -> list[dict[str, Any]]:
        """The figures of all steps, in the order in which they were made."""
        return [row for row in whole_lines(self.folder / "metrics.jsonl") if "train/loss" in row]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The first rank's events of a kind."""
        return [row for row in whole_lines(self.folder / "events" / "rank-00000.jsonl") if row["event"] == kind]

    def supervised(self, kind: str) -> list[dict[str, Any]]:
        """The supervisor's events of a kind."""
        return [row for row in whole_lines(self.folder / "events" / "agent.jsonl") if row["event"] == kind]

    def losses(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm by step; of a step that was made again, the last."""
        return {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in self.rows()}

    def newest(self) -> Path:
        """The newest checkpoint on disk."""
        return max(path.parent for path in self.folder.glob("checkpoints/step-*/COMPLETE"))

    def kill(self) -> None:
        """End whatever is left."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Process ids of a process's children; none of one that is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _descendants(pid: int) -> Iterator[int]:
    """A process and all below it, from the top."""
    yield pid
    for child in _children(pid):
        yield from _descendants(child)


def _rank(pid: int) -> int:
    """The RANK in a process's environment, -1 where there is none."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return int(entry[5:])
    return -1
