"""Where a run's figures and events go: plain JSON lines in its folder, and from there MLflow, TensorBoard and W&B.

The run writes its own files only; `trainer/carry.py`, another process, carries them on, so that a slow or dead
server never touches a step.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from configs.errors import InputError
from configs.schema import Run
from trainer.destination import Position
from trainer.launch import with_rooms

# Fields of `Tracking` and packages at once; beside them the names people know. "mlflow" comes with the trainer.
DESTINATIONS = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "W&B"}
PATIENCE = 120.0  # seconds the first rank waits at the end for what the writer still has to carry


class RunLog:
    """The append-only files of one run: `metrics.jsonl` and `events/rank-00000.jsonl`. Used by the first rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "events").mkdir(parents=True, exist_ok=True)
        self._metrics = _continued(folder / "metrics.jsonl")
        self._events = _continued(folder / "events" / "rank-00000.jsonl")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of figures after `step` updates."""
        self._metrics.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def event(self, kind: str, **facts: Any) -> None:
        """Something that happened: start, resume, save, evaluation, stop, done, diverged."""
        self._events.write(json.dumps({"time": time.time(), "event": kind, **facts}) + "\n")

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._events.close()


def _continued(path: Path) -> TextIO:
    """A file of JSON lines to append to; a line that a crash left half written is cut off first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", buffering=1)


class CarryProcess:
    """The process that carries a run's lines to MLflow, TensorBoard and W&B while the run goes on."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._run, self._folder = run, folder
        command = [sys.executable, "-m", "trainer.carry", str(folder), "--follow"]
        environment = {**with_rooms(), "OMP_NUM_THREADS": "1"}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with (folder / "logs" / "carry.log").open("a") as log:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def close(self, patience: float = PATIENCE) -> str | None:
        """Let it finish what is written.

        Returns:
            None, or a sentence on which destinations miss something and where it still is.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()  # end of input: the run is over
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
        return f"{' and '.join(missing)} did not take everything (logs/carry.log says why); metrics.jsonl has all of it"


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
