"""Ranks are started, watched and ended by real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from configs.errors import InputError
from trainer import cluster
from trainer.launch import free_port, launch
from trainer.machine import devices

PROGRAM = """
import importlib.util, json, os, signal, subprocess, sys, time
mode, folder = sys.argv[1:]
rank = os.environ["RANK"]
def save(number, frame):
    time.sleep(1)
    open(f"{folder}/{rank}.saved", "w").close()
    sys.exit(75)
if mode == "saving":
    signal.signal(signal.SIGTERM, save)
if mode == "deaf" or mode == "mixed" and rank == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "rooms":
    found = [importlib.util.find_spec(name).origin for name in ("models.blocks", "trainer.launch")]
    open(f"{folder}/{rank}.found", "w").write(json.dumps(found))
    sys.exit(0)
child = subprocess.Popen(["sleep", "600"])
open(f"{folder}/{rank}.pids", "w").write(f"{os.getpid()} {child.pid}")
if mode == "fine":
    sys.exit(0)
if mode == "raise" and rank == "1":
    raise SystemExit("a clear reason")
if mode == "killed" and rank == "1":
    os.kill(os.getpid(), 9)
if mode == "two":
    sys.exit("only a consequence" if rank == "0" else 76)
if mode.startswith("lost"):  # the other rank is gone: rank 0 sees that, and may be seen to end first
    if rank == "0":
        sys.exit("RuntimeError: Connection closed by peer [127.0.0.1]:4242, a consequence")
    if mode == "lost-killed":
        os.kill(os.getpid(), 9)
    sys.exit("ValueError: the reason")
if mode == "diverged":
    print("a line of the log", file=sys.stderr)
    sys.exit(77)
if mode == "warned":
    print("x.py:1: FutureWarning: old name", "  torch.old()", "the reason", sep=chr(10), file=sys.stderr)
    sys.exit(1)
if mode == "hung" and rank == "0":
    sys.exit(0)
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rank_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("trainer.launch.GRACE", 1.0)
    return "rank_program"


def when_started(folder: Path, world: int, *signals: tuple[float, int]) -> list[int]:
    """Once `world` ranks are up, send this process each signal after so many seconds, in a thread of its own.

    Returns:
        The signals sent while `launch` was there to take them; none is sent later, when they would end the tests.
    """
    sent: list[int] = []

    def send() -> None:
        deadline = time.monotonic() + 60
        while len([file for file in folder.glob("*.pids") if file.read_text()]) < world:
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.02)
        for pause, number in signals:
            time.sleep(pause)
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                return
            sent.append(number)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    return sent


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


@pytest.mark.parametrize(
    "signals",
    [
        [(0.0, signal.SIGUSR2), (0.1, signal.SIGTERM)],  # SLURM's own sequence
        [(0.0, signal.SIGINT), (0.1, signal.SIGINT), (0.1, signal.SIGINT)],  # an impatient person
    ],
)
def test_further_requests_leave_a_save_alone(
    signals: list[tuple[float, int]], program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.launch.INSIST", 60.0)
    sent = when_started(tmp_path, 2, *signals)
    assert launch([program, "saving", str(tmp_path)], 2, tmp_path / "logs", free_port(), True) == 75
    assert sent == [number for _, number in signals]
    assert sorted(file.name for file in tmp_path.glob("*.saved")) == ["0.saved", "1.saved"]


def test_only_ctrl_c_insists(
    program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.launch.INSIST", 0.2)
    signals = (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    sent = when_started(tmp_path, 2, *((0.5, number) for number in signals))
    assert launch([program, "deaf", str(tmp_path)], 2, tmp_path / "logs", free_port(), True) == 137
    assert sent == list(signals)  # neither SIGTERM nor SIGUSR2 ended it before
    assert "Ctrl-C again" in capfd.readouterr().err
    wait_for(alive(tmp_path))


@pytest.mark.parametrize("mode", ["sleep", "mixed"])
def test_a_request_before_the_ranks_can_heed_it_is_no_crash(
    mode: str, program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where one rank was ready and waits for the other."""
    when_started(tmp_path, 2, (0.0, signal.SIGINT))
    assert launch([program, mode, str(tmp_path)], 2, tmp_path / "logs", free_port(), True) == 130
    wait_for(alive(tmp_path))
    assert "killed" not in capfd.readouterr().err


def test_the_handlers_of_this_process_come_back(program: str, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    launch([program, "fine", str(tmp_path)], 1, tmp_path / "logs", free_port(), True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == before


@pytest.mark.parametrize(
    ("mode", "code", "there", "not_there"),
    [
        ("two", 76, "rank 1", "consequence"),
        ("lost", 1, "the reason", "a consequence"),
        ("lost-killed", 137, "rank 1", "a consequence"),
        ("diverged", 77, "exit code 77", "a line of the log"),
        ("warned", 1, "the reason", "torch.old"),
    ],
)
def test_the_failure_that_says_most_is_reported(
    mode: str, code: int, there: str, not_there: str, program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch([program, mode, str(tmp_path)], 2, tmp_path / "logs", free_port(), True) == code
    said = capfd.readouterr().err
    assert there in said
    assert not_there not in said
    assert "FutureWarning" not in said


def test_a_rank_that_hangs_after_the_others_left_is_ended_and_named(
    program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch([program, "hung", str(tmp_path)], 2, tmp_path / "logs", free_port(), True, patience=1.0) == 1
    said = capfd.readouterr().err
    assert "still running 1 s after another rank had left" in said
    assert "rank-00001.log" in said
    wait_for(alive(tmp_path))


def test_the_current_folder_does_not_shadow_the_rooms(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    for room in ("models", "trainer"):
        (tmp_path / "work" / room).mkdir(parents=True)
        for name in ("__init__", "blocks", "launch"):
            (tmp_path / "work" / room / f"{name}.py").write_text("raise RuntimeError('not ours')\n")
    monkeypatch.chdir(tmp_path / "work")
    assert launch([program, "rooms", str(tmp_path)], 1, tmp_path / "logs", free_port(), True) == 0
    found = json.loads((tmp_path / "0.found").read_text())
    assert found == [str(repository / "models" / "blocks.py"), str(repository / "trainer" / "launch.py")]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_whole_words(name: str, peak: float | None) -> None:
    assert devices.peak_of(name) == peak


@pytest.mark.parametrize(
    ("variables", "rank", "world"),
    [
        ({}, 0, 1),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1"}, 3, 8),
        ({"SLURM_LOCALID": "5", "SLURM_NTASKS_PER_NODE": "8"}, 5, 8),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 1, 4),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,1"}, 1, 2),
    ],
)
def test_a_ranks_place_on_its_machine(
    variables: dict[str, str], rank: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "LOCAL_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (cluster.local_rank(), cluster.local_world()) == (rank, world)
