"""Real answers of real processes name the rank that hangs and the collective that the others wait in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.stacks import Answer, Hang, culprit, read

PROGRAM = """
import ctypes, os, sys, time
import torch, torch.distributed as dist
from trainer.health import pulse
from trainer.cluster import Member
from trainer.health.goodput import Clock
def stuck_in_c():
    open(sys.argv[1] + "/ready", "w").close()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)  # holds Python's lock, and no signal wakes it
def stuck_in_python():
    open(sys.argv[1] + "/ready", "w").close()
    while True:
        time.sleep(0.1)
pulse.listen()
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/store", rank=rank, world_size=2)
with pulse.beating(Clock(2, time.time_ns()), Member(rank, 2, rank, torch.device("cpu"), dist.group.WORLD), rank):
    other = dist.new_group(backend="gloo")
    dist.barrier(group=other)
    dist.all_reduce(torch.ones(2))
    if rank == 1:
        globals()[sys.argv[3]]()
    dist.all_reduce(torch.ones(1))
"""


def hang(how: str, folder: Path, operations: int) -> Hang:
    """What is read from two ranks, of which the second hangs and the first waits for it."""
    (folder / "program.py").write_text(PROGRAM)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "TORCH_FR_BUFFER_SIZE": str(operations), "PYTHONPATH": root}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONSAFEPATH": "1"}
    ranks, logs = [], [folder / f"{rank}.err" for rank in range(2)]
    for rank, log in enumerate(logs):
        command = [sys.executable, "-u", str(folder / "program.py"), str(folder), str(rank), how]
        with log.open("wb") as errors:
            ranks.append(subprocess.Popen(command, stderr=errors, env=environment))
    try:
        deadline = time.monotonic() + 120
        while not (folder / "ready").exists():
            assert time.monotonic() < deadline, logs[1].read_text()
            time.sleep(0.05)
        time.sleep(1.0)  # rank 0 is in its all-reduce by now
        for process in ranks:
            process.send_signal(signal.SIGUSR1)
        while not all("most recent call first" in log.read_text() for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)
        return culprit({rank: log.read_text() for rank, log in enumerate(logs)}, {0: "n1", 1: "n2"})
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize("how", ["stuck_in_c", "stuck_in_python"])
def test_the_rank_that_hangs_and_the_collective_of_the_others(how: str, tmp_path: Path) -> None:
    found = hang(how, tmp_path, operations=100)
    assert found.ranks == (1,)
    assert f"rank 1 on n2 hangs in {'/'.join((tmp_path.name, 'program.py'))}:" in found.text
    assert how in found.text
    assert found.collectives == ("gloo:all_reduce 2 of group 0 default_pg, Float [1]",)
    assert "1 of 2 ranks wait in gloo:all_reduce 2" in found.text


def test_without_a_recorder_the_stacks_decide(tmp_path: Path) -> None:
    found = hang("stuck_in_python", tmp_path, operations=0)
    assert (found.ranks, found.collectives) == ((1,), ("all_reduce",))


def test_a_rank_without_a_stack_is_named() -> None:
    waits = 'Thread 0x1 (most recent call first):\n  File "torch/distributed/c.py", line 3 in barrier\n'
    found = culprit({0: waits, 1: "no stack here"})
    assert found.ranks == (1,)
    assert found.text == "rank 1 gave no stack; 1 of 2 ranks wait in barrier"
    assert culprit({}).text == "no rank gave a stack"


def test_who_holds_pythons_lock_inside_a_collective_is_named() -> None:
    inside = 'Thread 0x1 (most recent call first):\n  File "x.py", line 1 in stuck\n'
    inside += '  File "torch/distributed/c.py", line 3 in reduce_scatter\n'
    pending = {"group": "0", "number": 5, "name": "gloo:all_reduce", "sizes": [[]], "types": ["Double"], "over": False}
    found = culprit({0: inside, 1: f"collectives: {json.dumps([pending])}"})
    assert found.ranks == (0,)
    assert "rank 0 hangs in x.py:1 stuck" in found.text


def test_where_all_wait_the_one_behind_is_named() -> None:
    def answer(number: int, over: str) -> str:
        told = f'"group": "a", "number": {number}, "name": "x", "sizes": [], "types": [], "over": {over}'
        return f"collectives: [{{{told}}}]"

    assert culprit({0: answer(5, "false"), 1: answer(4, "false"), 2: answer(5, "false")}).ranks == (1,)
    assert "the network or a device is stuck" in culprit({0: answer(5, "false"), 1: answer(5, "false")}).text
    assert culprit({0: answer(5, "false"), 1: answer(5, "true")}).ranks == (1,)


def test_the_newest_answer_counts_and_damaged_ones_do_not() -> None:
    old = 'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n'
    new = 'Current thread 0x2 (most recent call first):\n  File "b.py", line 2 in g\n  File "c.py", line 3 in h\n'
    assert read(old + new).frames == (("b.py", 2, "g"), ("c.py", 3, "h"))
    assert read(new + "collectives: [{").pending is None
    assert read(new + "collectives: []\n") == Answer((("b.py", 2, "g"), ("c.py", 3, "h")))
