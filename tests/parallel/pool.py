"""Ranks of tests as forks of one process that has imported torch and DeepSpeed: two seconds once, not for each.

    pool.run([pool.Job("parity_worker", ("cases.json", "out"), world=2, logs=folder / "logs")])

As a program it is that process: python -m pool JOBS.json. A rank finds RANK, WORLD_SIZE and MASTER_* in its environment
as under `trainer.launch`, and calls the module's `main`.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
LIMIT = 1200.0  # seconds that a job may take


@dataclass(frozen=True)
class Job:
    """One world of ranks.

    Attributes:
        module: a file of this folder.
        arguments: of its `main`.
        logs: folder for the ranks' standard error and output, one file each.
    """

    module: str
    arguments: tuple[str, ...]
    world: int
    logs: str


def run(jobs: Sequence[Job], folder: Path) -> None:
    """Run the jobs, one after the other.

    Args:
        folder: for the list of jobs.

    Raises:
        RuntimeError: a rank failed; with the end of its log.
    """
    from trainer.launch import free_port, with_rooms

    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([{**asdict(job), "port": free_port()} for job in jobs]))
    rooms = with_rooms()
    path = os.pathsep.join((str(HERE), rooms["PYTHONPATH"]))
    environment = {**rooms, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "pool", str(listed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}{done.stderr}")


def main(listed: str) -> None:
    """Import, then fork the ranks of one job after the other."""
    import deepspeed
    import torch

    from trainer.engine import engine

    assert deepspeed, engine
    torch.set_num_threads(1)
    for entry in json.loads(Path(listed).read_text()):
        port = entry.pop("port")
        job = Job(**{**entry, "arguments": tuple(entry["arguments"])})
        Path(job.logs).mkdir(parents=True, exist_ok=True)
        importlib.import_module(job.module)
        _wait(job, {_forked(job, rank, port): rank for rank in range(job.world)})


def _forked(job: Job, rank: int, port: int) -> int:
    """Start one rank; returns its process id."""
    pid = os.fork()
    if pid == 0:
        _as_rank(job, rank, port)
    return pid


def _as_rank(job: Job, rank: int, port: int) -> NoReturn:
    """Run the module's main and end this process, whatever comes of it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    log = os.open(_log(job, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(job.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    code = 1
    try:
        importlib.import_module(job.module).main(*job.arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(job: Job, left: dict[int, int]) -> None:
    """Wait for the ranks (by process id); ends all where one fails or takes too long."""
    deadline = time.monotonic() + LIMIT
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
            continue
        rank = left.pop(pid, -1)
        if status or pid == 0:
            for other in left:
                os.kill(other, signal.SIGKILL)
            where = _log(job, rank) if pid else f"{job.logs}, too slow"
            tail = _log(job, rank).read_text(errors="replace")[-4000:] if pid else ""
            sys.exit(f"rank {rank} of {job.world} failed ({status}), see {where}:\n{tail}")


def _log(job: Job, rank: int) -> Path:
    """A rank's log."""
    return Path(job.logs) / f"rank-{rank:05d}.log"


if __name__ == "__main__":
    main(*sys.argv[1:])
