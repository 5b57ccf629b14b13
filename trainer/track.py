"""Where a run's figures and events go: plain JSON lines in its folder, and from there MLflow.

The run writes its own files only; `trainer/mlflow_writer.py`, another process, carries them to MLflow, so that a
slow or dead server never touches a step.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import Run


class RunLog:
    """The append-only files of one run: `metrics.jsonl` and `events/rank-00000.jsonl`. Used by the first rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "events").mkdir(parents=True, exist_ok=True)
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._events = (folder / "events" / "rank-00000.jsonl").open("a", buffering=1)

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


class MlflowProcess:
    """The process that carries a run's lines to MLflow while the run goes on."""

    def __init__(self, run: Run, folder: Path) -> None:
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "trainer.mlflow_writer", str(folder), "--follow"]
        log = (folder / "logs" / "mlflow.log").open("a")
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)
        log.close()

    def close(self, patience: float = 120.0) -> str | None:
        """Let it finish what is written.

        Returns:
            None, or a sentence on what is missing in MLflow and where it still is.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()  # end of input: the run is over
        try:
            code = self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = -9
        if code == 0:
            return None
        return "MLflow did not take everything (logs/mlflow.log says why); metrics.jsonl has all of it"


def tracking_uri(run: Run) -> str:
    """The run's wish, else MLFLOW_TRACKING_URI, else SQLite beside the runs."""
    return (
        run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(run.runs).resolve()}/mlflow.db"
    )


def run_folder(run: Run) -> Path:
    """The folder that belongs to `run`."""
    return Path(run.runs) / (run.name or run.recipe)
