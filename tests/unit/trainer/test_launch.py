"""Ranks are started, watched and ended by real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.errors import InputError
from trainer.launch import free_port, launch

PROGRAM = """
import os, subprocess, sys, time
mode, folder = sys.argv[1:]
rank = os.environ["RANK"]
child = subprocess.Popen(["sleep", "600"])
open(f"{folder}/{rank}.pids", "w").write(f"{os.getpid()} {child.pid}")
if mode == "fine":
    sys.exit(0)
if mode == "raise" and rank == "1":
    raise SystemExit("a clear reason")
if mode == "killed" and rank == "1":
    os.kill(os.getpid(), 9)
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rank_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("trainer.launch.GRACE", 1.0)
    return "rank_program"


def alive(folder: Path) -> list[int]:
    pids = [int(pid) for file in folder.glob("*.pids") for pid in file.read_text().split()]
    assert pids
    return [pid for pid in pids if runs(pid)]


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie that nobody has reaped yet."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(nobody: list[int]) -> None:
    """A killed process takes a moment to go."""
    deadline = time.monotonic() + 60
    while any(runs(pid) for pid in nobody):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.05)


@pytest.mark.parametrize(("mode", "code"), [("fine", 0), ("raise", 1), ("killed", 137)])
def test_one_failure_ends_all(
    mode: str, code: int, program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch([program, mode, str(tmp_path)], 3, tmp_path / "logs", free_port(), True) == code
    wait_for(alive(tmp_path))
    said = capfd.readouterr().err
    if mode == "raise":
        assert "rank 1" in said
        assert "a clear reason" in said
    if mode == "killed":
        assert "rank 1" in said
        assert "SIGKILL" in said


def test_launcher_killed_takes_its_ranks_along(program: str, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from trainer.launch import launch, free_port; "
        f"launch(['{program}', 'sleep', r'{tmp_path}'], 2, Path(r'{tmp_path}')/'logs', free_port(), True)"
    )
    root = str(Path(__file__).parent.parent.parent.parent)
    path = os.pathsep.join([root, str(tmp_path)])
    launcher = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pids"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(file.read_text().split()[0]) for file in tmp_path.glob("*.pids")]
    children = [int(file.read_text().split()[1]) for file in tmp_path.glob("*.pids")]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(ranks)
    for pid in children:  # this program's own children do not watch their parent; the loader's do (test_stream)
        os.kill(pid, signal.SIGKILL)


def test_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cluster.master_port = {port}: in use"):
            free_port(port)
