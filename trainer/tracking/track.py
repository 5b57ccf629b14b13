"""Where a run's figures and events go: plain JSON lines in its folder, and from there MLflow, TensorBoard and W&B.

The run writes its own files only; `trainer/tracking/carry.py`, another process, carries them on, so that a slow or dead
server never touches a step.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema import Run
from trainer.launch import with_rooms
from trainer.tracking.destination import Position
from trainer.tracking.journal import whole_lines

# Fields of `Tracking` and packages at once; beside them the names people know. "mlflow" comes with the trainer.
DESTINATIONS = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "W&B"}
EXAMPLES = "examples.json"  # in the run's folder: what `trainer.evaluation.examples` found in the last evaluation
PATIENCE = 120.0  # seconds the first rank waits at the end for what the writer still has to carry
UPLOAD = 600.0  # and where the run's weights are among it


class RunLog:
    """The append-only files of one run: `metrics.jsonl` and `events/rank-00000.jsonl`. Used by the first rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "events").mkdir(parents=True, exist_ok=True)
        self._metrics = Lines(folder / "metrics.jsonl")
        self._events = Lines(folder / "events" / "rank-00000.jsonl")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of figures after `step` updates."""
        self._metrics.write(json.dumps({"step": step, "time": time.time(), **values}))

    def event(self, kind: str, **facts: Any) -> None:
        """Something that happened: start, resume, save, evaluation, stop, done, diverged."""
        self._events.write(json.dumps({"time": time.time(), "event": kind, **facts}))

    def close(self) -> list[str]:
        """Close the files; returns a sentence for each that misses lines."""
        return [text for text in (self._metrics.close(), self._events.close()) if text]


def events(folder: Path) -> list[dict[str, Any]]:
    """The first rank's events."""
    return whole_lines(folder / "events" / "rank-00000.jsonl")


class Lines:
    """A file of lines to append to. What a full disk does not take waits in memory: no run ends for its log.

    A line that a crash left half written is cut off first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._problem = ""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)

    def write(self, line: str) -> None:
        """Append a line, after those that still wait."""
        self._waiting.append(line.encode() + b"\n")
        self._flush()

    def close(self) -> str:
        """Close the file; returns what it misses, or nothing."""
        self._flush()
        os.close(self._file)
        left = len(self._waiting)
        return f"{self._path}: {left} lines could not be written: {self._problem}" if left else ""

    def _flush(self) -> None:
        """Write what waits, as far as the disk takes it."""
        try:
            while self._waiting:
                rest = self._waiting[0][os.write(self._file, self._waiting[0]) :]
                self._waiting.popleft()
                if rest:  # the last bytes that fitted
                    self._waiting.appendleft(rest)
        except OSError as error:
            self._problem = str(error)


class CarryProcess:
    """The process that carries a run's lines to MLflow, TensorBoard and W&B while the run goes on."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._run, self._folder = run, folder
        command = [sys.executable, "-m", "trainer.tracking.carry", str(folder), "--follow"]
        environment = {**with_rooms(), "OMP_NUM_THREADS": "1"}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with (folder / "logs" / "carry.log").open("a") as log:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def close(self, patience: float = PATIENCE) -> str | None:
        """Let it finish what is written; weights for a registry may take longer.

        Returns:
            None, or a sentence on which destinations miss something and where it still is.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()  # end of input: the run is over
        if self._run.tracking.register and (self._folder / "done").exists():
            patience = max(patience, UPLOAD)
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode == 0:
            return None
        metrics = self._folder / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        missing = [DESTINATIONS[name] for name in wanted(self._run) if Position(self._folder, name).finished != size]
        if not missing:
            return None
        return (
            f"{' and '.join(missing)} did not take everything (logs/carry.log says why); metrics.jsonl has all of it; "
            f"`coatnet track sync {self._folder}` carries the rest"
        )


def wanted(run: Run) -> list[str]:
    """The destinations that a run names beside its own files."""
    return [name for name in DESTINATIONS if getattr(run.tracking, name)]


def check_sinks(run: Run) -> None:
    """Refuse a run whose figures are to go where a package is missing; call it before anything starts.

    Raises:
        InputError: naming the field, the package and how to get it.
    """
    for name in wanted(run):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: some folder of that name, W&B's own for example
            raise InputError(
                f"tracking.{name} = True: the package {name} is not installed; pip install {name}, or leave it out "
                f"with --tracking.no-{name}"
            )


def tracking_uri(run: Run) -> str:
    """The run's wish, else MLFLOW_TRACKING_URI, else SQLite beside the runs."""
    return (
        run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(run.runs).resolve()}/mlflow.db"
    )


def run_folder(run: Run) -> Path:
    """The folder that belongs to `run`."""
    return Path(run.folder)
