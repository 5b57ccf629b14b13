"""Starts the ranks of a run on this machine, watches them, and ends all when one fails. No torch.

Each rank is a session of its own: Ctrl-C reaches only this process, which asks the ranks to stop; they agree on a
step, save together and leave with exit code 75. Whatever a rank started is killed before this returns.
"""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from configs.errors import InputError

STOPPED = 75
POLL = 0.1  # seconds between two looks at the ranks
GRACE = 10.0  # seconds the others have to leave by themselves once a rank failed, then again after SIGTERM


@dataclass
class Rank:
    """One process of the run."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path


def free_port(wanted: int = 0) -> int:
    """A port for the rendezvous, below Linux's ephemeral range; `wanted` itself if it is given.

    Raises:
        InputError: the wanted port is in use.
    """
    candidates = [wanted] if wanted else random.sample(range(20000, 32000), 50)
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise InputError(
        f"cluster.master_port = {wanted}: in use by another program on this machine; nearest valid: "
        f"0, which picks a free one"
    )


def launch(arguments: Sequence[str], world: int, logs: Path, port: int, one_thread_each: bool) -> int:
    """Run `python -m ARGUMENTS` as `world` ranks until all are done.

    Args:
        logs: folder for the ranks' standard error, and the output of all but the first rank.
        one_thread_each: share the processor's cores out among the ranks (for CPU ranks).

    Returns:
        0, 75 when the ranks stopped on request, else the exit code of the rank that failed first (128 + signal).
    """
    logs.mkdir(parents=True, exist_ok=True)
    ranks = [_start(arguments, number, world, logs, port, one_thread_each) for number in range(world)]
    asked: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        _signal_all(ranks, signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        return _watch(ranks)
    finally:
        for rank in ranks:  # their loader workers and writers share their session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(arguments: Sequence[str], number: int, world: int, logs: Path, port: int, one_thread_each: bool) -> Rank:
    """Start one rank."""
    environment = {
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONFAULTHANDLER": "1",
    }
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if one_thread_each:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    root = str(Path(__file__).parent.parent)  # ranks find the rooms without an installation too
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    log = logs / f"rank-{number:05d}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )
    return Rank(number, process, log)


def _stop_with_parent() -> None:
    """Linux: have the kernel ask this process to stop (and save) should its parent be killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _watch(ranks: list[Rank]) -> int:
    """Wait for all ranks; once one fails, give the others a little time, then end them."""
    failed: Rank | None = None
    deadline, hard = float("inf"), False
    while any(rank.process.poll() is None for rank in ranks):
        if failed is None:
            failed = next((rank for rank in ranks if rank.process.poll() not in (None, 0, STOPPED)), None)
            deadline = time.monotonic() + GRACE if failed is not None else deadline
        elif time.monotonic() > deadline:
            _signal_all(ranks, signal.SIGKILL if hard else signal.SIGTERM)
            deadline, hard = time.monotonic() + GRACE, True
        time.sleep(POLL)
    failed = failed or next((rank for rank in ranks if rank.process.returncode not in (0, STOPPED)), None)
    if failed is None:
        return max(rank.process.returncode for rank in ranks)
    return _report(failed)


def _report(failed: Rank) -> int:
    """Say which rank failed and how; returns the exit code for the whole."""
    code = failed.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    sys.stderr.write(f"rank {failed.number} (process {failed.process.pid}) {how}; the other ranks were ended\n")
    tail = failed.log.read_text(errors="replace").splitlines()[-25:]
    if code > 0 and tail:
        sys.stderr.write("\n".join([f"the end of {failed.log}:", *tail]) + "\n")
    return 128 - code if code < 0 else code


def _signal_all(ranks: list[Rank], number: signal.Signals) -> None:
    """Send a signal to every rank that still runs."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)
