"""Where the wall time of a run went: every nanosecond since its first start is in exactly one class.

productive   steps that the run still has, also those whose update was left out
lost         steps, and waits for their data, that a crash or a rollback undid: they are made again
restart      an attempt's processes start, until its first step, and leave after its last
down         between two attempts, with what passed unseen after the last line of the first of them
save         training stood still for a checkpoint
data         steps waited for the loader, on the first rank
evaluation   scoring the held-out split
compile      what the first two steps of an attempt took longer than its third

The sums are carried in the checkpoints, and every few seconds a thread adds them to `events/clock.jsonl`. When the run
goes on from a checkpoint, what the last line has more of steps and their data than that checkpoint becomes lost: work
is lost once, however many attempts began at the same checkpoint, and a kill -9 hides one interval at most.
"""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.tracking.journal import Journal

Class = Literal["productive", "lost", "restart", "down", "save", "data", "evaluation", "compile"]
CLASSES: tuple[Class, ...] = get_args(Class)
REDONE: tuple[Class, ...] = ("productive", "data")  # what is lost with the steps that are made again
WARM = 2  # steps of an attempt that compile and tune
INTERVAL = 10.0  # seconds between two lines
FILE = "clock.jsonl"  # in the folder of events
TAIL = 1 << 16  # bytes at the end of the file that are read first
BEGAN = "COATNET_BEGAN"  # variable: unix time at which the command began that started the ranks
NS = 1_000_000_000


@dataclass
class Book:
    """The sums.

    Attributes:
        began: of the first attempt, in nanoseconds of unix time.
        until: the time up to which the sums go; `until - began` is their sum, always.
        spent: nanoseconds by class.
        devices: nanoseconds times devices by class; nobody is known to hold devices between two attempts.
        attempts: starts of the run's processes.
    """

    began: int
    until: int
    spent: dict[Class, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    devices: dict[Class, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    attempts: int = 0

    def advance(self, kind: Class, now: int, devices: int) -> None:
        """Time went on in a class. A clock that was set back stands still until it is caught up."""
        passed = max(0, now - self.until)
        self.until += passed
        self.spent[kind] += passed
        self.devices[kind] += passed * devices

    def move(self, source: Class, target: Class, amount: int, devices: int) -> None:
        """Count time that is in one class in another."""
        for sums, part in ((self.spent, amount), (self.devices, amount * devices)):
            sums[source] -= part
            sums[target] += part

    def back_to(self, saved: "Book | None") -> None:
        """The run goes on from a checkpoint that held `saved`, or from nothing: steps made since then are lost."""
        for kind in REDONE:
            for sums, kept in ((self.spent, saved and saved.spent), (self.devices, saved and saved.devices)):
                gone = sums[kind] - (kept[kind] if kept else 0)
                sums[kind] -= gone
                sums["lost"] += gone

    @property
    def wall(self) -> float:
        """Seconds since the first start."""
        return (self.until - self.began) / NS

    @property
    def goodput(self) -> float:
        """Productive share of the wall time: the effective training time ratio so far."""
        return self.spent["productive"] / max(1, self.until - self.began)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "began": self.began,
            "until": self.until,
            "spent": dict(self.spent),
            "devices": dict(self.devices),
            "attempts": self.attempts,
        }

    @staticmethod
    def of(state: dict[str, Any]) -> "Book":
        """The sums that `state` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        spent = {name: int(state["spent"][name]) for name in CLASSES}
        devices = {name: int(state["devices"][name]) for name in CLASSES}
        return Book(int(state["began"]), int(state["until"]), spent, devices, int(state["attempts"]))


class Clock:
    """The running sums of one attempt on one rank, in one class at a time.

    Attributes:
        book: the sums, up to the last change of class.
        ledger: what the lines tell beside the sums: the state of `trainer.cost.ledger.Ledger`.
        journal: writes the sums down, on the first rank.
        held: device-seconds up to the last line of the attempt before.
        step: updates made.
        took: seconds of the last step, with its wait for data.
    """

    def __init__(
        self, devices: int, began: int, last: dict[str, Any] | None = None, now: Callable[[], int] | None = None
    ) -> None:
        """Begin an attempt, in its restart.

        Args:
            devices: held by the run.
            began: when the attempt's processes were started, in nanoseconds of unix time.
            last: the last line of the attempt before, None if there is none.
            now: the unix time in nanoseconds; else read once, and continued by the monotonic clock.
        """
        self.book = Book.of(last) if last is not None else Book(began, began)
        self.ledger: dict[str, Any] = dict(last.get("ledger", {})) if last is not None else {}
        self.held, self.step, self.took = sum(self.book.devices.values()) / NS, 0, 0.0
        self.journal: Journal | None = None
        self._devices, self._began = devices, began
        self._known: float = self.book.until if last is not None else 0
        self._now, self._kind, self._lock = now or _wall_clock(), CLASSES[2], threading.Lock()
        self._warm: list[int] | None = []
        self._mark = 0
        self.book.attempts += 1
        self.book.advance("down", began, 0)

    @property
    def kind(self) -> Class:
        """The class it is in."""
        return self._kind

    def go_on(self, saved: dict[str, Any] | None) -> None:
        """The run goes on from a checkpoint with these sums, or from nothing; at a start and at every rollback."""
        with self._lock:
            kept = Book.of(saved) if saved is not None else None
            if kept is not None and kept.until > self._known:  # the lines were lost, with all that came after it
                attempts = max(kept.attempts + 1, self.book.attempts)
                self.book = Book(kept.began, kept.until, dict(kept.spent), dict(kept.devices), attempts)
                self.book.advance("down", self._began, 0)
            self._advance()
            self.book.back_to(kept)
            self._known = math.inf  # from now on nothing is missing
            self._mark = self.book.spent["productive"]

    def enter(self, kind: Class) -> Class:
        """What follows is of this class; returns the class that ends."""
        with self._lock:
            self._advance()
            before, self._kind = self._kind, kind
            return before

    @contextlib.contextmanager
    def of(self, kind: Class) -> Iterator[None]:
        """Around something of another class."""
        before = self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def stepped(self, step: int, waited: float) -> None:
        """A step is done.

        Args:
            step: updates made.
            waited: seconds of it in which it waited for data.
        """
        with self._lock:
            self._advance()
            took = max(0, self.book.spent["productive"] - self._mark)
            self.took = took / NS
            wait = min(took, round(waited * NS))
            self.book.move("productive", "data", wait, self._devices)
            self.step, took = step, took - wait
            if self._warm is not None and len(self._warm) < WARM:
                self._warm.append(took)
            elif self._warm is not None:
                longer = sum(max(0, first - took) for first in self._warm)
                self.book.move("productive", "compile", longer, self._devices)
                self._warm = None
            self._mark = self.book.spent["productive"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. What it calls productive stays so: a compilation cannot be told apart any more."""
        with self._lock:
            self._advance()
            self._warm = None
            return self.book.state()

    def line(self) -> dict[str, Any]:
        """One line of the file."""
        with self._lock:
            self._advance()
            facts = {"time": time.time(), "event": "clock", "step": self.step, "class": self._kind}
            return {**facts, **self.book.state(), "ledger": self.ledger}

    def now(self) -> Book:
        """The sums up to this moment."""
        with self._lock:
            self._advance()
            return Book.of(self.book.state())

    def _advance(self) -> None:
        self.book.advance(self._kind, self._now(), self._devices)


def metrics(book: Book) -> dict[str, float]:
    """The sums under the names of DESIGN.md."""
    return {"perf/goodput": book.goodput, **{f"goodput/{name}": book.spent[name] / NS for name in CLASSES}}


def summary(book: Book) -> str:
    """A line for a person, at the end of a run."""
    parts = [(book.spent[name] / NS, name) for name in CLASSES if book.spent[name]]
    told = ", ".join(f"{name} {seconds:.1f} s ({seconds / book.wall:.1%})" for seconds, name in sorted(parts)[::-1])
    return f"goodput {book.goodput:.1%} of {book.wall:.1f} s in {book.attempts} attempt(s): {told}"


@contextlib.contextmanager
def attempt(folder: Path, devices: int, first: bool) -> Iterator[Clock]:
    """Around a new attempt of the run in `folder`: its clock, which the first rank writes down."""
    began = round(float(os.environ.get(BEGAN) or process_began()) * NS)
    if not first:
        yield Clock(devices, began)
        return
    path = folder / "events" / FILE
    clock = Clock(devices, began, last_line(path))
    journal = Journal(path, clock.line, INTERVAL)  # each line has all that one before it would have had
    clock.journal = journal
    try:
        yield clock
    finally:
        journal.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of sums; what a crash or a full disk left half written is passed over."""
    try:
        return list(_whole_lines(path.read_bytes()))
    except FileNotFoundError:
        return []


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line, None if there is none. Of months of lines only the end is read, where that is enough."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for part in (TAIL, size):
                file.seek(max(0, size - part))
                found = list(_whole_lines(file.read()))
                if found:
                    return found[-1]
    except FileNotFoundError:
        return None
    return None


def _whole_lines(content: bytes) -> Iterator[dict[str, Any]]:
    """The lines in a part of a file of sums."""
    for text in content.decode("ascii", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            Book.of(line)
            yield line


def process_began() -> float:
    """Unix time at which this process was started (proc(5): field 22 of stat, in clock ticks since the boot)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _wall_clock() -> Callable[[], int]:
    """Unix time in nanoseconds that nobody sets back: read now, continued by the monotonic clock."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: time.monotonic_ns() + offset
