"""Requests to stop at awkward moments, ranks that an outside launcher started, and a working folder with our names."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from trainer.launch import free_port

pytestmark = pytest.mark.timeout(600)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(digits: Path, tmp_path: Path, repository: Path) -> Start:
    """Starts `coatnet train` in a folder that has a `models` and a `trainer` of its own; the run is tmp_path/run."""
    for room in ("models", "trainer"):
        (tmp_path / "work" / room).mkdir(parents=True)
        for name in ("__init__", "blocks", "train", "carry"):
            (tmp_path / "work" / room / f"{name}.py").write_text("raise RuntimeError('not ours')\n")

    def train(*words: str, steps: int = 400, variables: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "trainer.cli", "train", "demo-digits", "--data.path", str(digits)]
        command += ["--runs", str(tmp_path), "--name", "run", "--model.resolution", "32", "--data.workers", "1"]
        command += ["--optim.steps", str(steps), "--optim.warmup-steps", "4", "--checkpoint.every", "1000"]
        command += ["--tracking.log-every", "1", "--tracking.no-mlflow", *words]
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", **(variables or {})}
        pipe, work = subprocess.PIPE, tmp_path / "work"
        return subprocess.Popen(command, cwd=work, env=environment, stdout=pipe, stderr=pipe, text=True)

    return train


def wait_until(there: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def steps(folder: Path) -> list[int]:
    """Steps whose figures are written."""
    if not (folder / "metrics.jsonl").exists():
        return []
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines(True) if line[-1] == "\n"]
    return [row["step"] for row in rows if "train/loss" in row]


def test_the_sequence_of_a_scheduler_is_one_request(start: Start, tmp_path: Path) -> None:
    """SIGUSR2, and SIGTERM while the ranks are about to save; the figures still reach TensorBoard's files."""
    run = tmp_path / "run"
    process = start("--tracking.tensorboard")
    wait_until(lambda: len(steps(run)) >= 3, process)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert (run / "checkpoints" / f"step-{steps(run)[-1]:08d}" / "COMPLETE").exists()
    assert "not ours" not in said + (run / "logs" / "carry.log").read_text()
    assert list(run.rglob("events.out.tfevents*"))


def test_a_stop_before_the_first_step_is_no_crash(start: Start, tmp_path: Path) -> None:
    process = start()
    wait_until((tmp_path / "run" / "logs" / "rank-00001.log").exists, process)  # its process is about to start
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert "stopped before the first step; nothing to save" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_a_request_to_ranks_that_are_done_changes_nothing(start: Start, tmp_path: Path) -> None:
    """It comes while they leave: Python's own end takes the handlers away before the process is gone."""
    process = start(steps=6)
    wait_until(lambda: bool(steps(tmp_path / "run")), process)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in family if "trainer.train" in child.cmdline()]
    assert len(ranks) == 2
    wait_until((tmp_path / "run" / "done").exists, process)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 0, said


def test_ranks_of_an_outside_launcher_hold_the_folder(start: Start, tmp_path: Path) -> None:
    """As under srun, which says neither LOCAL_RANK nor LOCAL_WORLD_SIZE."""
    port, run = str(free_port()), tmp_path / "run"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS_PER_NODE": "2"}
    ranks = [start(variables={**place, "RANK": number, "SLURM_LOCALID": number}) for number in ("0", "1")]
    wait_until(lambda: len(steps(run)) >= 3, ranks[0])
    with (run / "lock").open("w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        code, said = finish(rank)
        assert code == 75, said
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failed_rank_does_not_wait_for_what_is_pending(repository: Path, tmp_path: Path) -> None:
    """Python's own end would wait for the thread, as it can for a collective of nccl."""
    code = (
        "import sys, threading, time\n"
        "from trainer.train import main\n"
        "threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        f"sys.exit(main([{str(tmp_path / 'run.json')!r}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 76
    assert "run.json: cannot be read" in done.stderr
