"""Starts ranks on this machine, watches them, and ends all when one fails. No torch.

Each rank is a session of its own: Ctrl-C reaches only this process, which asks the ranks to stop; they agree on a
step, save together and leave with exit code 75. Further requests change nothing, because a scheduler sends several and
the save takes its time; only a person who presses Ctrl-C again later ends the ranks at once. Whatever a rank started
is killed before this returns. `launch` is one try; `coatnet train` gives a `LocalStep` to the supervisor of
`slurm/agent.py`, which starts another one after a crash or a hang.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from configs.errors import InputError
from trainer.health.goodput import BEGAN

LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what an outside launcher tells each rank
STOPPED = 75
INTERRUPTED = 130  # stopped before the ranks could take a step: there was nothing to save
FINE = (0, STOPPED)
TELLING = (76, 77)  # bad input, diverged: codes that say why, where others are often only what followed from it
# How a rank's log ends that only lost another one: gloo's words, NCCL's, the store's.
LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection refused",
             "DistBackendError", "DistNetworkError", "Timed out waiting", "Application timeout")  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
POLL = 0.1  # seconds between two looks at the ranks
GRACE = 10.0  # seconds the others have to leave by themselves once a rank failed
INSIST = 3.0  # seconds after the first request from which on another Ctrl-C means: at once
TAIL = 25  # lines of a failed rank's log that are shown
INSISTED = "Ctrl-C again: the ranks were ended at once, and what they had not saved is lost\n"


@dataclass
class Rank:
    """One process of the run."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Request:
    """What signals asked of this process; `launch` acts on it, so that ranks started meanwhile are not missed.

    Attributes:
        since: when the first request came, in seconds of the monotonic clock; infinity for none.
        insisted: whether somebody pressed Ctrl-C again, `INSIST` seconds later or more.
    """

    since: float = float("inf")
    insisted: bool = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        now = time.monotonic()
        self.insisted |= number == signal.SIGINT and now - self.since >= INSIST
        self.since = min(self.since, now)


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


def launch(
    arguments: Sequence[str],
    world: int,
    logs: Path,
    port: int,
    on_cpu: bool,
    patience: float = 600.0,
    lock: int | None = None,
    began: float | None = None,
    more: Mapping[str, str] | None = None,
) -> int:
    """Run `python -m ARGUMENTS` as `world` ranks until all are done.

    Args:
        logs: folder for the ranks' standard error, and the output of all but the first rank.
        on_cpu: the ranks compute on the processor: share its cores out, and let them keep the memory they took.
        patience: seconds the other ranks have to end once one has left as it should.
        lock: file descriptor of the run's lock; the ranks hold it as well, because after a kill -9 of this process
            they save before they leave.
        began: unix time at which the command began; this moment if it is not given.
        more: variables of the ranks, beside those of this process.

    Returns:
        0; 75 when the ranks stopped on request; 130 when they were asked before they could; 137 when Ctrl-C insisted;
        1 when some hung at the end; else what the failed rank gave that says most (128 + signal).
    """
    request = Request()
    previous = {number: signal.signal(number, request.take) for number in SIGNALS}
    environment = rank_environment(world, port, on_cpu, {**with_rooms(), **(more or {})})
    environment[BEGAN] = str(began or time.time())
    step, forwarded = None, False
    try:
        step = LocalStep(arguments, world, logs, environment, patience, () if lock is None else (lock,))
        while (code := step.wait(POLL)) is None:
            if request.insisted:
                sys.stderr.write(INSISTED)
                return 128 + signal.SIGKILL
            if not forwarded and request.since <= time.monotonic():
                step.signal(signal.SIGTERM)
                forwarded = True
        return code
    finally:
        if step is not None:
            step.end()
        for number, handler in previous.items():
            signal.signal(number, handler)


class LocalStep:
    """The ranks of one try, as processes of this machine.

    Attributes:
        logs: of the ranks' standard error, and the output of all but the first rank.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        world: int,
        logs: Path,
        environment: Mapping[str, str],
        patience: float = 600.0,
        held: Sequence[int] = (),
    ) -> None:
        """Start `python -m ARGUMENTS` as `world` ranks.

        Args:
            logs: folder for the logs; they go on where an earlier try's end.
            environment: of all ranks.
            patience: seconds the other ranks have to end once one has left as it should.
            held: file descriptors that the ranks hold as well.
        """
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{number:05d}.log" for number in range(world)]
        self._ranks: list[Rank] = []
        self._failed: list[Rank] = []
        self._asked = self._over = False
        self._patience, self._left, self._broke = patience, float("inf"), float("inf")
        try:
            for number, log in enumerate(self.logs):
                self._ranks.append(_start(arguments, number, log, environment, held))
        except BaseException:
            self.end()
            raise

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of all ranks, so long at most; whatever they started has ended then too.

        Returns:
            The exit code of the whole, see `launch`; None while they run.
        """
        deadline = time.monotonic() + seconds
        while (code := self._look(time.monotonic())) is None and time.monotonic() < deadline:
            time.sleep(POLL)
        if code is not None:
            self.end()
        return code

    def signal(self, number: int) -> None:
        """Send every rank that still runs a signal."""
        self._asked |= number in SIGNALS
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    def end(self) -> None:
        """Kill the ranks and what they started: their loader workers and writers share their session."""
        if self._over:
            return
        self._over = True
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()

    def _look(self, now: float) -> int | None:
        """The exit code of the whole once all ranks are done, or the rest has to be ended."""
        if self._over:
            return 128 + signal.SIGKILL
        codes = [(rank, rank.process.poll()) for rank in self._ranks]
        running = [rank for rank, code in codes if code is None]
        failed = self._failed
        failed += [rank for rank, code in codes if code not in (None, *FINE) and rank not in failed]
        if any(code in FINE for _, code in codes):
            self._left = min(self._left, now)
        if failed:
            # What made one rank fail often reaches the others, and this process, a moment later: look once more.
            self._broke = min(self._broke, now)
            if now < self._broke + POLL:
                return None
        if self._asked and failed and self._left > now and all(-rank.process.returncode in SIGNALS for rank in failed):
            return INTERRUPTED  # a signal ended them before their handler was there; no step is made without them
        if not running:
            return _report(failed) if failed else max(rank.process.returncode for rank in self._ranks)
        if now > self._broke + GRACE:
            return _report(failed)
        if not failed and now > self._left + self._patience:
            return _report_hung(running, self._patience)
        return None


def with_rooms() -> dict[str, str]:
    """This process's environment, in which `python -m` finds the rooms first.

    Python would otherwise put the current folder in front, where a `models/` of the user's would shadow ours; and the
    rooms are found without an installation too.
    """
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def rank_environment(world: int, port: int, on_cpu: bool, given: Mapping[str, str]) -> dict[str, str]:
    """What all ranks of this machine find in their environment, beside what is given."""
    environment = {
        **given,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONFAULTHANDLER": "1",
    }
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if on_cpu:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
        # glibc would give the activations' memory back after each step, and fault it in again in the next.
        environment.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")
        environment.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000000")
    return environment


def _start(
    arguments: Sequence[str], number: int, log: Path, environment: Mapping[str, str], held: Sequence[int]
) -> Rank:
    """Start one rank; it inherits the file descriptors `held`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *arguments],
            env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else output,
            stderr=output,
            start_new_session=True,
            pass_fds=held,
            preexec_fn=_stop_with_parent,
        )
    return Rank(number, process, log)


def _stop_with_parent() -> None:
    """Linux: have the kernel ask this process to stop (and save) should its parent be killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _report(failed: list[Rank]) -> int:
    """Say which rank failed and how, the one that says most; returns the exit code for the whole."""
    rank = min(failed, key=_consequence)  # the first of those that say most: `min` keeps their order
    code = rank.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    sys.stderr.write(f"rank {rank.number} (process {rank.process.pid}) {how}; the other ranks were ended\n")
    lines = _last_lines(rank.log) if code > 0 and code != 77 else []  # of a divergence the figures tell
    if lines:
        sys.stderr.write("\n".join([f"the end of {rank.log}:", *lines]) + "\n")
    return 128 - code if code < 0 else code


def _consequence(rank: Rank) -> int:
    """How likely a rank failed only because another one had, from 0, which says why, to 3.

    The operating system does not say which of two processes ended first. NCCL's watchdog aborts by a signal.
    """
    code = rank.process.returncode
    if code in TELLING:
        return 0
    if code < 0:
        return 3 if code == -signal.SIGABRT else 1
    return 3 if any(word in line for line in _last_lines(rank.log) for word in LOST_PEER) else 2


def _report_hung(running: list[Rank], patience: float) -> int:
    """Say which ranks did not end after others had; returns the exit code for the whole."""
    names = ", ".join(f"{rank.number} (process {rank.process.pid})" for rank in running)
    sys.stderr.write(
        f"still running {patience:g} s after another rank had left as it should: rank {names}; ended. See "
        f"{running[0].log}\n"
    )
    return 1


def _last_lines(log: Path) -> list[str]:
    """The last lines of a log, without Python's announcements of changes to come and the source line below each."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 16)))
        lines = file.read().decode(errors="replace").splitlines()
    kept: list[str] = []
    warned = False
    for line in lines:
        below = warned and line.startswith(" ")
        warned = "FutureWarning" in line
        if not warned and not below:
            kept.append(line)
    return kept[-TAIL:]
