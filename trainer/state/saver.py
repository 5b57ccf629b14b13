"""When and how a run's state goes to disk: at once, or from a copy in the host's memory while training goes on.

A save that training does not wait for: a thread of every rank copies its part to the host's memory while the next step
makes its forward and backward passes, which change none of it; whoever changes it, an update first of all, calls
`settle` before and waits if the copy is not finished, which is the whole stall. Then the thread writes, hashes and
fsyncs the copy and agrees with the other ranks' threads in a process group of their own, so that no collective of the
steps and none of the writers ever share one. It holds Python's lock for a few microseconds per 8 MB. There is one copy:
a save that comes due before the last one is on disk waits for it, or is left out, on all ranks alike.
"""

import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Checkpoint
from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.state import checkpoint, retention, snapshot
from trainer.state.checkpoint import SaveError
from trainer.state.host_memory import HostMemory
from trainer.state.interval import Interval
from trainer.state.snapshot import Snapshot

PATIENCE = timedelta(hours=2)  # a writer waits so long for the slowest disk; a rank that died is noticed at once


@dataclass(frozen=True)
class Outcome:
    """What became of one save.

    Attributes:
        stall: seconds that training stood still for it.
        write: seconds until it counted, beside training; 0 where training waited.
        bytes: of all ranks' files.
        problem: why it failed or was left out; empty for a good one.
        notes: what a person should know: what could not be deleted, that the disk is nearly full.
    """

    step: int
    stall: float
    write: float = 0.0
    bytes: int = 0
    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class _Write:
    """One save under way in a thread; `copied` is set when it needs the live state no more."""

    thread: threading.Thread
    step: int
    stall: float
    copied: threading.Event
    outcome: Outcome | None = None
    crash: BaseException | None = None


class Saver:
    """Saves a run's state and keeps the folder of its checkpoints in order. All ranks make the same calls.

    Attributes:
        interval: between two saves.
    """

    def __init__(self, root: Path, wish: Checkpoint, member: Member, asynchronous: bool, reach: int = 0) -> None:
        """Nothing is saved yet.

        Args:
            reach: steps that a rollback may go back behind the newest checkpoint.
        """
        self.root, self.wish, self.member, self._reach = root, wish, member, reach
        self.interval = Interval(wish.every, wish.mtbf_hours)
        self._host = HostMemory(member.device)
        self._write: _Write | None = None
        self._finished: list[Outcome] = []
        self._writers: Member | None = None
        if asynchronous:
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            assert isinstance(group, dist.ProcessGroup)
            self._writers = replace(member, control=group)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Process groups in which only its threads meet."""
        return [] if self._writers is None else [self._writers.control]

    def save(
        self, step: int, state: dict[str, Any], fragments: list[Fragment], buffers: dict[str, Tensor], last: bool
    ) -> None:
        """Save the state after `step` updates; what came of it is told by `finished`. A collective call.

        Args:
            last: nothing follows: it is written from where it is, since nobody trains meanwhile, and must succeed.

        Raises:
            SaveError: the last save could not be written.
        """
        began = time.perf_counter()
        live = snapshot.of(state, fragments, buffers)
        background = self._writers is not None and not last
        obstacle = self._host.reserve(live) if background else ""
        busy, refused, needed = self._agree(live, obstacle)
        if busy and not last and self.wish.overlap == "skip":
            skipped = "left out: the one before it is still being written (checkpoint.overlap = 'skip')"
            self._finished.append(Outcome(step, time.perf_counter() - began, problem=skipped))
            return
        self._join()
        warning = retention.forecast(self.root, needed) if self.member.first else ""
        notes = tuple(filter(None, (warning, obstacle)))
        if background and not refused:
            self._start(step, live, began, notes)
            return
        try:
            outcome = self._commit(step, live, self.member)
        except SaveError as error:
            self._finished.append(Outcome(step, time.perf_counter() - began, problem=str(error), notes=notes))
            if last:
                raise
            return
        done = time.perf_counter() - began
        self._finished.append(replace(outcome, stall=done, notes=(*notes, *outcome.notes)))

    @property
    def copying(self) -> bool:
        """Whether a save still reads the live state."""
        return self._write is not None and not self._write.copied.is_set()

    def settle(self) -> None:
        """Wait until no save reads the live state any more: to be called before anything in it changes."""
        if self._write is not None and self.copying:
            began = time.perf_counter()
            self._write.copied.wait()
            self._write.stall += time.perf_counter() - began

    def finished(self, wait: bool = False) -> list[Outcome]:
        """The outcomes since the last call.

        Args:
            wait: until the save under way is done.

        Raises:
            Exception: what broke the thread that writes, other than a disk: another rank is gone.
        """
        if self._write is not None and (wait or not self._write.thread.is_alive()):
            self._join()
        outcomes, self._finished = self._finished, []
        for outcome in outcomes:
            if not outcome.problem:
                self.interval.measured(outcome.stall, outcome.write)
        return outcomes

    def _agree(self, live: Snapshot, obstacle: str) -> tuple[bool, bool, int]:
        """Whether any rank still writes, whether any lacks room, and the bytes of all; takes the first's interval."""
        busy = self._write is not None and self._write.thread.is_alive()
        mine = torch.tensor([busy, bool(obstacle), live.bytes, self.interval.wanted()])
        rows = [torch.zeros_like(mine) for _ in range(self.member.world)]
        dist.all_gather(rows, mine, group=self.member.control)
        every = torch.stack(rows)
        self.interval.steps = int(every[0, 3])
        return bool(every[:, 0].any()), bool(every[:, 1].any()), int(every[:, 2].sum())

    def _commit(self, step: int, part: Snapshot, member: Member) -> Outcome:
        """Write a save, then delete what no rule keeps."""
        _, size = checkpoint.commit(self.root, step, part, member)
        notes: list[str] = []
        if member.first:
            notes = retention.prune(self.root, self.wish, step, self._reach)
            notes += filter(None, [retention.forecast(self.root, size, retention.coming(self.root, self.wish))])
        return Outcome(step, 0.0, bytes=size, notes=tuple(notes))

    def _start(self, step: int, live: Snapshot, began: float, notes: tuple[str, ...]) -> None:
        """Copy and write in a thread."""
        assert self._writers is not None
        writers, mark = self._writers, self._host.mark()

        def write() -> None:
            """The thread."""
            start = time.perf_counter()
            try:
                try:
                    copy = self._host.copy(live, mark)
                finally:
                    work.copied.set()
                outcome = self._commit(step, copy, writers)
            except SaveError as error:
                outcome = Outcome(step, 0.0, problem=str(error))  # the same on all ranks
            except BaseException as error:
                work.crash = error
                return
            seconds = time.perf_counter() - start
            work.outcome = replace(outcome, write=seconds, notes=(*notes, *outcome.notes))

        thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        work = self._write = _Write(thread, step, 0.0, threading.Event())
        thread.start()
        work.stall = time.perf_counter() - began

    def _join(self) -> None:
        """Wait for the save under way and take its outcome."""
        if self._write is None:
            return
        work, self._write = self._write, None
        work.thread.join()
        if work.crash is not None:
            raise RuntimeError(f"the save of step {work.step} broke off") from work.crash
        assert work.outcome is not None, "a thread that ended tells how"
        self._finished.append(replace(work.outcome, stall=work.stall))
