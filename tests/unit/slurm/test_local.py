"""The supervisor without a scheduler: real ranks of this machine crash, hang and are asked to stop."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slurm import agent
from slurm.agent import Supervisor
from slurm.job import Job
from trainer.launch import LocalStep, free_port, rank_environment

PROGRAM = """
import ctypes, faulthandler, json, os, signal, sys, time
mode, folder = sys.argv[1:]
rank = int(os.environ["RANK"])
tries = len(os.listdir(f"{folder}/heartbeat"))
open(f"{folder}/{tries}.{rank}.port", "w").write(os.environ["MASTER_PORT"])
faulthandler.register(signal.SIGUSR1, all_threads=True)

def move(step):
    beats = os.environ["COATNET_HEARTBEAT"]
    told = {"time": time.time(), "moves": step, "step": step, "phase": "train", "longest": 0.01}
    with open(f"{beats}/here.json.tmp", "w") as file:
        json.dump(told, file)
    os.replace(f"{beats}/here.json.tmp", f"{beats}/here.json")

def leave(number, frame):
    sys.exit(75)

signal.signal(signal.SIGUSR2, signal.SIG_IGN if mode == "deaf" else leave)
begin = 10 * tries if mode == "advances" else 10
for step in range(begin, begin + 5):
    if rank == 0:
        move(step)
    time.sleep(0.02)
if mode == "advances" and rank == 0:
    os.makedirs(f"{folder}/checkpoints/step-{tries:08d}")
    open(f"{folder}/checkpoints/step-{tries:08d}/COMPLETE", "w").close()
if mode in ("advances", "loop") or mode in ("once", "kill") and tries == 1:
    if rank == 1 and mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        sys.exit(3)
    time.sleep(600)
elif mode == "hang" and tries == 1 or mode == "deaf":
    if rank == 1:
        ctypes.PyDLL(None).sleep(600)  # holds the GIL
    time.sleep(600)
elif mode == "wait":
    time.sleep(600)
elif mode == "input":
    sys.exit(76)
if rank == 0:
    open(f"{folder}/done", "w").close()
"""

Supervise = Callable[..., int]


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    """Runs the program in a mode on two ranks under the supervisor; its exit code."""
    (tmp_path / "rank_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("trainer.launch.GRACE", 0.5)
    monkeypatch.setattr(agent, "LOOK", 0.1)
    monkeypatch.setattr(agent, "POLL", 0.1)
    monkeypatch.setattr(agent, "DUMP", 1.0)

    def spawn(name: str, environment: dict[str, str]) -> LocalStep:
        own = rank_environment(2, free_port(), True, environment)
        return LocalStep(["rank_program", *job.command], 2, tmp_path / "logs", own)

    job = Job(str(tmp_path), str(tmp_path), sys.executable, [])

    def run(mode: str, crashes: int = 3) -> int:
        nonlocal job
        job = Job(
            str(tmp_path), str(tmp_path), sys.executable, [mode, str(tmp_path)], ranks_per_node=2, requeue=False,
            crashes=crashes, pause=0.1, beat=4.0, grace=float("inf"),
        )  # fmt: skip
        return Supervisor(job, dict(os.environ), spawn).run()

    return run


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events" / "agent.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def later(folder: Path, *signals: tuple[float, int], tries: int = 1) -> None:
    """Once a try has moved, the last of so many, send this process the signals, each after so many seconds."""

    def send() -> None:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("heartbeat/*/here.json"))) < tries:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for pause, number in signals:
            time.sleep(pause)
            if signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler):
                os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("mode", ["once", "kill"])
def test_a_crashed_rank_is_started_again_in_place(
    mode: str, supervise: Supervise, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise(mode) == 0
    assert [event["code"] for event in events(tmp_path, "ended")] == [3 if mode == "once" else 137, 0]
    said = capfd.readouterr().err
    assert "rank 1" in said
    assert "failure 1 of at most 3 without progress" in said
    assert "the training is finished" not in said
    tries = [event["try"] for event in events(tmp_path, "try")]
    assert len(set(tries)) == 2
    first, second = ({(tmp_path / f"{number}.{rank}.port").read_text() for rank in (0, 1)} for number in (1, 2))
    assert len(first) == len(second) == 1


def test_a_hung_rank_is_named_ended_and_started_again(
    supervise: Supervise, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise("hang") == 0
    hung = events(tmp_path, "hung")
    assert len(hung) == 1
    assert "nothing moved for 4 s on here at train" in hung[0]["why"]
    assert "rank_program.py" in hung[0]["named"]
    assert [event["hung"] for event in events(tmp_path, "ended")] == [True, False]
    assert "hung; failure 1" in capfd.readouterr().err


def test_a_crash_loop_gives_up_with_its_own_code(
    supervise: Supervise, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise("loop", crashes=2) == 3
    assert len(events(tmp_path, "ended")) == 3
    assert "3 times without progress: given up" in capfd.readouterr().err
    # A person who gives the command again has a budget again.
    assert supervise("loop", crashes=1) == 3
    assert len(events(tmp_path, "ended")) == 5


def test_no_restarts_leave_the_first_crash_the_last_word(
    supervise: Supervise, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise("loop", crashes=0) == 3
    assert len(events(tmp_path, "ended")) == 1
    said = capfd.readouterr().err
    assert "ended with exit code 3; the other ranks were ended" in said
    assert "given up" not in said


def test_progress_gives_the_budget_back(supervise: Supervise, tmp_path: Path) -> None:
    """It crashes for ever, but advances; the request to stop ends it."""
    later(tmp_path, (0.0, signal.SIGTERM), tries=3)
    assert supervise("advances", crashes=1) in (75, 3, 130)
    assert len(events(tmp_path, "ended")) > 2
    assert events(tmp_path, "decide")[-1]["action"] == "finish"
    assert all("failure 1 of" in event["why"] for event in events(tmp_path, "decide")[:-1])


def test_bad_input_is_not_tried_again(supervise: Supervise, tmp_path: Path) -> None:
    assert supervise("input") == 76
    assert len(events(tmp_path, "ended")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_request_to_stop_ends_the_run_not_the_try(number: int, supervise: Supervise, tmp_path: Path) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    later(tmp_path, (0.5, number))
    assert supervise("wait") == 75
    assert len(events(tmp_path, "ended")) == 1
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == before


def test_ctrl_c_again_ends_ranks_that_do_not_leave(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent, "INSIST", 0.3)
    later(tmp_path, (0.3, signal.SIGINT), (0.5, signal.SIGTERM), (0.1, signal.SIGINT))
    assert supervise("deaf") == 137
    assert "Ctrl-C again" in capfd.readouterr().err
    assert len(events(tmp_path, "ended")) == 1
