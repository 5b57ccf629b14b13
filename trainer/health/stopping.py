"""Requests to stop or to save: noted at any moment, agreed on by the ranks between two steps.

A signal sets a flag on the rank that it reaches. The first rank also looks for the files `stop` and `save` in the
run's folder, and at the clock where the end of the job is known: it asks in time for a save and for leaving.
"""

import contextlib
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from configs.schema import Run
from trainer.cluster import Member

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
LOOK = 1.0  # seconds between two looks for the files
LEAST = 30.0  # seconds before the known end that are kept free in any case
UNMEASURED = 120.0  # seconds that a save is taken to need before there was one
Item = TypeVar("Item")


def end_of(run: Run) -> float:
    """Unix time at which the machine goes away: the run's word, else SLURM's; infinity where neither says."""
    said = run.cluster.end_time or os.environ.get("SLURM_JOB_END_TIME", "")
    if not said:
        return math.inf
    return float(said) if said.isdecimal() else datetime.fromisoformat(said).timestamp()


def margin(save: float, step: float) -> float:
    """Seconds before the end at which to ask: a save may have to wait for the one before it, a step is under way.

    Args:
        save: seconds from a save's beginning until it is on disk.
        step: of the longest recent step.
    """
    return LEAST + 2.0 * save + 3.0 * step


class StopFlag:
    """What this rank was asked for, and what any rank was.

    Attributes:
        stopping: whether the ranks have agreed to stop.
        reason: why this rank asks, for the log; empty where it does not, or where another one did.
    """

    def __init__(self) -> None:
        self.stopping, self.reason = False, ""
        self._save = self._file_asks = False  # agreed on; seen here and not told yet
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._folder: Path | None = None
        self._end, self._looked, self._last = math.inf, -math.inf, math.inf
        self._gaps: deque[float] = deque(maxlen=16)
        self._save_seconds = UNMEASURED  # of a save, as they were told last
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def watch(self, folder: Path, end: float) -> None:
        """Look for the files in the run's folder, and at the clock; on the first rank.

        Args:
            end: unix time at which the machine goes away.
        """
        self._folder, self._end = folder, end

    def agreed(self, member: Member, save: float | None = None) -> bool:
        """Whether some rank had been asked to stop when this was last called; call it once per step on every rank.

        The exchange started by one call is read by the next, so that no rank waits for the slowest here.

        Args:
            save: seconds that a save takes; None: as far as is known.
        """
        now = time.monotonic()
        self._gaps.append(max(0.0, now - self._last))
        self._last = now
        self._save_seconds = self._save_seconds if save is None else save
        self._look(now, self._save_seconds)
        self._read()
        self._exchange(member)
        return self.stopping

    def agreed_now(self, member: Member) -> bool:
        """Whether some rank has been asked to stop by now; waits for all ranks."""
        self.finish()
        self._look(time.monotonic(), 0.0)  # nothing is to be saved
        self._exchange(member)
        self._read()
        return self.stopping

    def saves(self) -> bool:
        """Whether a save was asked for, and agreed on; says so once."""
        asked, self._save = self._save, False
        return asked

    def until(self, items: Iterable[Item], member: Member) -> Iterator[Item]:
        """Items until the ranks agree to stop, at least one of them; the same number on every rank."""
        for item in items:
            yield item
            if self.agreed(member):
                return

    def finish(self) -> None:
        """Complete the exchange that is under way, before the process group is left."""
        self._read()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler. Nothing but a note: it may come in the middle of a save, and several times."""
        self.reason = self.reason or signal.Signals(number).name

    def _look(self, now: float, save: float) -> None:
        """Take what the files and the clock ask for."""
        if self._folder is None or now - self._looked < LOOK:
            return
        self._looked = now
        if (self._folder / "stop").exists():
            self.reason = self.reason or f"the file {self._folder / 'stop'}"
        if time.time() + margin(save, max(self._gaps, default=0.0)) >= self._end:
            self.reason = self.reason or "the known end of the job is near"
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "save").unlink()
            self._file_asks = True

    def _exchange(self, member: Member) -> None:
        """Tell the others what this rank is asked for."""
        flags = torch.tensor([float(bool(self.reason)), float(self._file_asks)])
        self._file_asks = False
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=member.control, async_op=True)
        assert work is not None
        self._pending = (work, flags)

    def _read(self) -> None:
        """Take what the others told."""
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            self.stopping |= bool(flags[0].item())
            self._save |= bool(flags[1].item())
            self._pending = None
