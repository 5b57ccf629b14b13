"""What this rank tells the supervisor: that its work goes on, and where it stands when it is asked.

The loop counts what it does, and a thread puts the count into a small file every few seconds, where the supervisor
has named a folder for it (COATNET_HEARTBEAT; `slurm/beat.py` reads it). A thread that merely lives is no sign of life:
the supervisor looks whether the count moves. One rank of a node speaks for it; the others only while they wait for
something that may take long, so that the rest, who wait for them, are not taken to hang.

On SIGUSR1 all threads' stacks go to standard error, written in C, so that a rank answers that is stuck in a driver call
too. The thread adds the newest operation of every process group, from torch's flight recorder: which collective, by
its number, shape and type, and whether it is over. `slurm/stacks.py` finds the rank that the others wait for.
"""

import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from trainer.cluster import Member
from trainer.health.goodput import WARM, Clock

FOLDER = "COATNET_HEARTBEAT"  # variable: where the files of this try lie
PERIOD = 2.0  # seconds between two looks of the thread
LENGTH = 200  # bytes of a file
SPEAKS = 5.0  # seconds of waiting from which on a rank speaks that is not its node's first
KEPT = 512  # steps whose times are kept
SHOWN = 64  # operations that an answer has at most
PHASES = {"restart": "start", "productive": "train", "save": "save", "evaluation": "evaluate"}
MARK = "collectives: "  # begins the line about the process groups
Item = TypeVar("Item")


class Pulse:
    """The signs of life of this rank."""

    def __init__(self, clock: Clock, folder: Path | None, first: bool, name: str) -> None:
        """Count nothing yet.

        Args:
            clock: says what the rank is at.
            folder: of the files; None: nobody reads them.
            first: whether this rank speaks for its node.
            name: of its file.
        """
        self._clock, self._folder, self._first = clock, folder, first
        self._path = folder / f"{name}.json" if folder is not None else None
        self._moves = self._steps = 0
        self._waits, self._since = False, time.monotonic()
        self._times: deque[float] = deque(maxlen=KEPT)
        self._warm = 0.0
        self._told: dict[str, Any] = {}

    @property
    def phase(self) -> str:
        """What the rank is at: start, train, data, save, evaluate."""
        phase = PHASES.get(self._clock.kind, "start")
        if phase == "train" and self._steps < WARM:
            return "start"  # the first steps compile and tune
        return "data" if self._waits else phase

    @property
    def longest(self) -> float:
        """Seconds of the 99th percentile step, at first of the last one that compiled and tuned; 0 before any."""
        times = sorted(self._times)
        return times[math.ceil(0.99 * len(times)) - 1] if times else self._warm

    def step(self) -> int:
        """A step is done; how many there were in this attempt."""
        if self._steps >= WARM:
            self._times.append(self._clock.took)
        else:  # the step behind it may take as long, and nothing else is known of it
            self._warm = self._clock.took
        self._moves += 1
        self._steps += 1
        return self._steps

    def over(self, items: Iterable[Item]) -> Generator[Item]:
        """The same items; each one that comes is a sign of life, and who waits for one may wait long."""
        source = iter(items)
        while True:
            self._waits, self._since = True, time.monotonic()
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                self._waits = False
                self._moves += 1
            yield item

    def tell(self) -> None:
        """Write the file, if there is anything new to tell."""
        if self._path is None:
            return
        phase = self.phase
        told = {"moves": self._moves, "step": self._clock.step, "phase": phase, "longest": round(self.longest, 3)}
        silent = not self._first and (phase != "data" or time.monotonic() - self._since < SPEAKS)
        if silent and self._told:
            self._path.unlink(missing_ok=True)
            self._told = {}
        if silent or told == self._told:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Written in place and closed, in one piece of a fixed length: over NFS another node that opens the file sees
        # that at once, where it may go on seeing a replaced file's old content for a minute.
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, json.dumps({"time": time.time(), **told}).ljust(LENGTH).encode(), 0)
        finally:
            os.close(file)
        self._told = told


def listen() -> None:
    """From now on SIGUSR1 writes all threads' stacks to standard error, and Python hears of it as well."""
    faulthandler.unregister(signal.SIGUSR1)  # of `slurm.rank`: registered twice it would not come before ours again
    signal.signal(signal.SIGUSR1, _heard)
    with contextlib.suppress(ValueError, OSError):  # standard error is no file: in a notebook, in a test
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)


def _heard(number: int, frame: FrameType | None) -> None:
    """The signal reaches the thread through its pipe; the main thread has nothing to do."""


@contextlib.contextmanager
def beating(clock: Clock, member: Member, local_rank: int) -> Iterator[Pulse]:
    """Around an attempt of the run: its signs of life, which a thread writes down.

    Args:
        local_rank: number of this rank among those of its node, whatever devices it sees.
    """
    folder = os.environ.get(FOLDER)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # a container may have a name of its own
    name = f"{host}~{member.rank}" if local_rank else host
    pulse = Pulse(clock, Path(folder) if folder else None, local_rank == 0, name)
    ended = threading.Event()
    reads, writes = os.pipe()
    for end in (reads, writes):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    thread = threading.Thread(target=_run, args=(pulse, reads, ended), name="pulse", daemon=True)
    thread.start()
    try:
        yield pulse
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.write(writes, b"\0")
        thread.join()
        os.close(reads)
        os.close(writes)


def _run(pulse: Pulse, reads: int, ended: threading.Event) -> None:
    """The thread: tells what the rank does, and answers SIGUSR1, whose number the pipe brings."""
    while not ended.is_set():
        try:
            ready, _, _ = select.select([reads], [], [], PERIOD)
            if ready and signal.SIGUSR1 in os.read(reads, 4096):
                sys.stderr.write(f"{MARK}{json.dumps(collectives())}\n")
            pulse.tell()
        except Exception as error:  # whatever it is: without this thread a healthy run would be taken to hang
            sys.stderr.write(f"pulse: {type(error).__name__}: {error}\n")
            ended.wait(PERIOD)


def collectives() -> list[dict[str, Any]]:
    """The newest collective and point-to-point operation of every process group, and older ones that are not over.

    Each is {"group", "number", "name", "sizes", "types", "over"}; gloo's and NCCL's.
    """
    import torch._C._distributed_c10d as c10d

    found: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # a torch without CUDA has no second one
        content = json.loads(getattr(c10d, name)(True, False)) if hasattr(c10d, name) else {}
        newest: dict[tuple[str, bool], dict[str, Any]] = {}
        for entry in content.get("entries", []):
            pair = bool(entry["is_p2p"])
            told = {
                "group": " ".join(entry["process_group"]),
                "number": entry["p2p_seq_id" if pair else "collective_seq_id"],
                "name": entry["profiling_name"],
                "sizes": entry["input_sizes"],
                "types": entry["input_dtypes"],
                "over": entry["retired"] or entry["state"] == "completed",
            }
            before = newest.get((told["group"], pair))
            if before is not None and not before["over"]:
                found.append(before)
            newest[told["group"], pair] = told
        found += newest.values()
    return found[-SHOWN:]
