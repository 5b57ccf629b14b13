"""A rank of `coatnet train` that hangs is named, and the run goes on by itself to the same losses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from slurm.beat import LEAST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 40


def start(digits: Path, runs: Path, name: str, repository: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "trainer.cli", "train", "demo-digits", "--data.path", str(digits)]
    command += ["--runs", str(runs), "--name", name, "--model.resolution", "32", "--data.workers", "1"]
    command += ["--optim.steps", str(STEPS), "--optim.warmup-steps", "4", "--checkpoint.every", "8"]
    command += ["--tracking.log-every", "1", "--tracking.no-mlflow"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=repository, env=environment, stdout=pipe, stderr=pipe, text=True)


def rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in rows(folder / "metrics.jsonl") if "train/loss" in row}


def test_a_stopped_rank_is_named_and_the_run_goes_on(digits: Path, tmp_path: Path, repository: Path) -> None:
    """SIGSTOP: neither Python nor C answers there. The others wait for it in a collective, and say which."""
    undisturbed = start(digits, tmp_path, "undisturbed", repository)
    assert undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0
    folder, process = tmp_path / "hangs", start(digits, tmp_path, "hangs", repository)
    deadline = time.monotonic() + 300
    while len(losses(folder)) < 12:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    victim = next(
        child for child in family if child.environ().get("RANK") == "1" and "trainer.train" in child.cmdline()
    )
    struck = time.time()
    victim.send_signal(signal.SIGSTOP)
    said = "".join(process.communicate(timeout=500))
    assert process.returncode == 0, said
    hung = next(event for event in rows(folder / "events" / "agent.jsonl") if event["event"] == "hung")
    print(f"named {hung['time'] - struck:.1f} s after it was stopped: {hung['named']}")
    assert "rank 1" in hung["named"]
    assert hung["time"] - struck < max(60.0, LEAST + 15.0)  # the promise itself
    assert "hung; failure 1 of at most 3 without progress" in said
    assert losses(folder) == losses(tmp_path / "undisturbed")
