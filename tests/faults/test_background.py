"""`coatnet submit --cluster local`: a run in the background of this machine is watched, asked to leave, and goes on."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)
Coatnet = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def coatnet(repository: Path) -> Coatnet:
    """A command, to its end."""

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "trainer.cli", *words]
        variables = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=repository, env=variables, capture_output=True, text=True, timeout=300)

    return run


def test_a_run_in_the_background(coatnet: Coatnet, digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    run = tmp_path / "run"
    words = ["submit", "demo-digits", "--cluster", "local", "--data.path", str(digits), "--runs", str(tmp_path)]
    words += ["--name", "run", "--model.resolution", "32", "--data.workers", "0", "--cluster.ranks", "1"]
    words += ["--optim.steps", "2000", "--optim.warmup-steps", "4", "--tracking.log-every", "1", "--tracking.no-mlflow"]
    done = coatnet(*words)
    assert done.returncode == 0, done.stderr
    assert "started process" in done.stdout

    def state() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(coatnet("status", str(run), "--json").stdout)
        return found

    deadline = time.monotonic() + 300
    while not (found := state())["step"]:
        assert found["state"] == "running", [path.read_text() for path in (run / "submitit").glob("*.err")]
        assert time.monotonic() < deadline
        time.sleep(1)
    again = coatnet(*words)
    assert (again.returncode, "another process trains here" in again.stderr) == (76, True), again.stderr
    assert "asked to save and leave" in coatnet("cancel", str(run)).stdout
    while (found := state())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(1)
    assert found["state"] == "stopped"
    assert "stop" in found["why"]
    assert found["last_save"]["step"] == found["step"] > 0
    code = next((run / "code").glob("*/SNAPSHOT"))
    assert code.read_text()  # what ran was the copy
    log = next((run / "submitit").glob("*_0_log.out"))
    assert "stopped on request" in log.read_text()
    assert "stopped on request" in coatnet("logs", str(run)).stdout


def test_what_belongs_to_a_cluster_is_refused(coatnet: Coatnet, tmp_path: Path) -> None:
    done = coatnet("submit", "demo-digits", "--cluster", "local", "--nodes", "2", "--runs", str(tmp_path))
    assert done.returncode == 76
    assert "--nodes: belongs to a cluster with SLURM" in done.stderr
