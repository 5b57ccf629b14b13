"""Requests to stop at awkward moments, ranks that an outside launcher started, and a working folder with our names.

Starting a run costs far more than its few steps, so what several tests could show of one run is shown in one.
"""

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
from typing import Any

import psutil
import pytest

from trainer.launch import free_port
from trainer.state import checkpoint

pytestmark = pytest.mark.timeout(600)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(digits: Path, tmp_path: Path, repository: Path) -> Start:
    """Starts `coatnet train` in a folder that has a `models` and a `trainer` of its own; the run is tmp_path/run.

    One rank that loads its data itself; more words override.
    """
    for room in ("models", "trainer"):
        (tmp_path / "work" / room).mkdir(parents=True)
        for name in ("__init__", "blocks", "train", "carry"):
            (tmp_path / "work" / room / f"{name}.py").write_text("raise RuntimeError('not ours')\n")

    def train(*words: str, steps: int = 400, variables: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "trainer.cli", "train", "demo-digits", "--data.path", str(digits)]
        command += ["--runs", str(tmp_path), "--name", "run", "--model.resolution", "32", "--cluster.ranks", "1"]
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


def events(folder: Path) -> list[dict[str, Any]]:
    """What the first rank wrote down."""
    file = folder / "events" / "rank-00000.jsonl"
    lines = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line[-1] == "\n"]


def log_of(folder: Path) -> str:
    """What the ranks had to say beside the figures."""
    return "".join(file.read_text() for file in (folder / "logs").glob("rank-*.log"))


def ranks_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The ranks that a command started."""
    return [child for child in psutil.Process(process.pid).children() if "trainer.train" in child.cmdline()]


def assert_saved(run: Path) -> None:
    """The last step is saved, whole."""
    assert checkpoint.damage(run / "checkpoints" / f"step-{steps(run)[-1]:08d}") == ""
    assert not list(run.glob("checkpoints/*.partial"))


def test_the_file_save_and_then_the_sequence_of_a_scheduler(start: Start, tmp_path: Path) -> None:
    """One save, and training goes on; then SIGUSR2, and SIGTERM while the ranks are about to save: one request.

    The second save knows what the first one cost, and chooses the interval from it.
    """
    run = tmp_path / "run"
    process = start("--cluster.ranks", "2", "--checkpoint.every", "0", "--tracking.tensorboard")
    wait_until(lambda: bool(steps(run)), process)
    (run / "save").touch()
    wait_until(lambda: any(event["event"] == "save" for event in events(run)), process)
    assert not (run / "save").exists()
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert "not ours" not in said + (run / "logs" / "carry.log").read_text()
    saved = [event["of_step"] for event in events(run) if event["event"] == "save"]
    assert len(saved) == 2
    assert 1 < saved[0] < saved[1] == steps(run)[-1]
    assert_saved(run)
    (chosen,) = [event for event in events(run) if event["event"] == "interval"]
    assert chosen["steps"] >= 1
    assert chosen["stall"] > 0
    assert f"saves every {chosen['steps']} steps from now on" in said
    assert list(run.rglob("events.out.tfevents*"))


def test_a_stop_before_the_first_step_is_no_crash(start: Start, tmp_path: Path) -> None:
    process = start("--cluster.ranks", "2")
    wait_until((tmp_path / "run" / "logs" / "rank-00001.log").exists, process)  # its process is about to start
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert "stopped before the first step; nothing to save" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_a_stop_that_waits_for_the_first_step_and_the_known_end_of_the_job(start: Start, tmp_path: Path) -> None:
    """The file is there before the rank can look; the next start of the run is a new wish.

    Before a save was measured it counts as two minutes, and 30 s are kept free: the next start asks soon.
    """
    run = tmp_path / "run"
    process = start()
    wait_until((run / "logs" / "rank-00000.log").exists, process)
    (run / "stop").touch()
    code, said = finish(process)
    assert code == 75, said
    assert "stopped on request at step 0, nothing to save" in said
    assert not list((run / "checkpoints").glob("*"))
    end = time.time() + 279
    code, said = finish(start(steps=400, variables={"SLURM_JOB_END_TIME": str(int(end))}))
    assert code == 75, said
    assert time.time() < end
    assert not (run / "stop").exists()
    reasons = [event["reason"] for event in events(run) if event["event"] == "stop"]
    assert reasons == [f"the file {run / 'stop'}", "the known end of the job is near"]
    assert_saved(run)


def test_a_stop_while_the_workers_start(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("--data.workers", "2")
    wait_until(lambda: any(event["event"] == "origin" for event in events(run)), process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert "Traceback" not in said + log_of(run)


def test_a_stop_in_the_middle_of_a_save(start: Start, tmp_path: Path) -> None:
    """Several signals reach the rank itself."""
    run = tmp_path / "run"
    process = start("--checkpoint.every", "1", "--checkpoint.no-asynchronous")
    wait_until(lambda: bool(list(run.glob("checkpoints/*.partial"))), process)
    (rank,) = ranks_of(process)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        rank.send_signal(number)
    code, said = finish(process)
    assert code == 75, said
    assert_saved(run)


def test_the_folder_is_held_until_the_ranks_have_left(start: Start, tmp_path: Path) -> None:
    """After a kill -9 of the command, here in an evaluation, they break it off and save by themselves.

    Nobody may begin to train there meanwhile.
    """
    run = tmp_path / "run"
    process = start("--cluster.ranks", "2", "--evaluate.every", "5", "--evaluate.micro-batch", "1")
    wait_until(lambda: 5 in steps(run), process)
    ranks = ranks_of(process)
    for rank in ranks:
        rank.suspend()
    process.kill()
    process.wait()
    with (run / "lock").open("w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for rank in ranks:
        rank.resume()
    assert not psutil.wait_procs(ranks, timeout=120)[1]
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert steps(run)[-1] == 5
    assert_saved(run)
    assert not any(event["event"] == "evaluation" for event in events(run))


def test_a_stop_in_the_final_evaluation_and_one_that_comes_too_late(start: Start, tmp_path: Path) -> None:
    """Single pictures make it slow; it is broken off, and made by the next start.

    That one is asked while it leaves: Python's own end takes the handlers away before the process is gone.
    """
    run = tmp_path / "run"
    process = start("--evaluate.micro-batch", "1", steps=5)
    wait_until(lambda: 5 in steps(run), process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert "this evaluation is not finished" in said
    assert_saved(run)
    assert not any(event["event"] == "evaluation" for event in events(run))
    assert not (run / "done").exists()
    process = start(steps=5)
    wait_until(lambda: bool(ranks_of(process)), process)
    ranks = ranks_of(process)
    wait_until((run / "done").exists, process)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 0, said
    assert json.loads((run / "evaluation.json").read_text())["step"] == 5


def test_ranks_of_an_outside_launcher_when_every_process_is_signalled(start: Start, tmp_path: Path) -> None:
    """As under srun, which says neither LOCAL_RANK nor LOCAL_WORLD_SIZE, and after `scancel --signal`.

    They hold the folder as long as they live, and their loaders still deliver what the last steps need.
    """
    port, run = str(free_port()), tmp_path / "run"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS_PER_NODE": "2"}
    places = [{**place, "RANK": number, "SLURM_LOCALID": number} for number in ("0", "1")]
    ranks = [start("--data.workers", "1", variables=variables) for variables in places]
    wait_until(lambda: len(steps(run)) >= 3, ranks[0])
    with (run / "lock").open("w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for rank in ranks:
        for member in [*psutil.Process(rank.pid).children(recursive=True), rank]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
    for rank in ranks:
        code, said = finish(rank)
        assert code == 75, said
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert_saved(run)


def test_the_loaders_server_outlives_the_signals_of_a_job(repository: Path) -> None:
    """Without it torch takes the workers for dead when a batch is late."""
    code = (
        "import os, signal, time\n"
        "from multiprocessing.forkserver import _forkserver\n"
        "from data_pipeline import stream\n"
        "before = signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "stream._context()\n"
        "assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):\n"
        "    os.kill(_forkserver._forkserver_pid, number)\n"
        "time.sleep(0.5)\n"
        "assert os.waitpid(_forkserver._forkserver_pid, os.WNOHANG) == (0, 0)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


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
