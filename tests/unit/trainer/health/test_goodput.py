"""Every nanosecond of a run is in one class, whatever happens to it: held against a plain list of intervals."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.cost.ledger import Ledger
from trainer.health import goodput
from trainer.health.goodput import BEGAN, CLASSES, NS, REDONE, Book, Class, Clock
from trainer.tracking.journal import Journal

BATCH = 4


@dataclass
class Interval:
    """A stretch of time in the plain second implementation."""

    kind: Class
    length: int
    devices: int
    step: int = 0  # of a productive one, or of waiting for its data


@dataclass
class Life:
    """A run as a list of intervals, beside the clock and the ledger under test."""

    now: int = 1000 * NS
    intervals: list[Interval] = field(default_factory=list)
    saves: dict[int, tuple[dict[str, Any], dict[str, float]]] = field(default_factory=dict)
    line: dict[str, Any] | None = None
    step: int = 0
    devices: int = 1
    lost_images: int = 0

    def start(self, pause: int, world: int) -> None:
        """A new attempt from the newest save."""
        self.now += pause
        if self.line is not None:
            self.intervals = [*self.seen, Interval("down", self.now - self.seen_until, 0)]
            self.lost_images = self.seen_lost + (self.seen_step - max(self.saves, default=0)) * BATCH
        self.devices = world
        self.clock = Clock(world, self.now, self.line, now=lambda: self.now)
        self.ledger = Ledger(1)
        self.spend("restart", 3)
        self.go_back()

    def roll_back(self) -> None:
        """In the same attempt, where all is known."""
        self.lost_images += (self.step - max(self.saves, default=0)) * BATCH
        self.go_back()

    def go_back(self) -> None:
        """To the newest save, or to nothing."""
        saved = max(self.saves, default=0)
        for part in self.intervals:
            if part.kind in REDONE and part.step > saved:
                part.kind = "lost"
        self.step = saved
        state, ledger = self.saves.get(saved, (None, None))
        self.clock.go_on(state)
        self.ledger.go_on(ledger, self.clock.ledger, self.clock.held)
        self.tell()

    def tell(self) -> None:
        """As `Session.count_time` does."""
        self.ledger.held(self.clock.now())
        self.clock.ledger = self.ledger.state()

    def spend(self, kind: Class, seconds: float) -> None:
        """Time in a class."""
        with self.clock.of(kind):
            self.now += round(seconds * NS)
        self.intervals.append(Interval(kind, round(seconds * NS), self.devices, self.step))

    def train(self, seconds: float, waited: float) -> None:
        """A step."""
        self.step += 1
        self.spend("productive", seconds)
        wait = min(round(waited * NS), round(seconds * NS))
        self.intervals[-1].length -= wait
        self.intervals.append(Interval("data", wait, self.devices, self.step))
        self.clock.stepped(self.step, waited)
        self.ledger.images += BATCH
        self.tell()

    def save(self) -> None:
        """A checkpoint."""
        self.tell()
        self.saves[self.step] = self.clock.state(), self.ledger.state()
        self.see()

    def write(self) -> None:
        """A line of the file."""
        self.line = json.loads(json.dumps(self.clock.line()))
        self.see()

    def see(self) -> None:
        """What came before the last line or save is known after a crash, and nothing else."""
        self.seen = [Interval(**vars(part)) for part in self.intervals]
        self.seen_until, self.seen_step, self.seen_lost = self.now, self.step, self.lost_images

    def sums(self) -> dict[str, int]:
        """Nanoseconds by class."""
        return {kind: sum(part.length for part in self.intervals if part.kind == kind) for kind in CLASSES}


seconds = st.floats(0.0, 100.0)
moves = st.one_of(
    st.tuples(st.just("train"), seconds, st.floats(0.0, 150.0)),
    st.tuples(st.sampled_from(["save", "write", "roll_back"])),
    st.tuples(st.just("spend"), st.sampled_from(["evaluation", "save"]), seconds),
    st.tuples(st.just("crash"), st.integers(0, 1000 * NS), st.integers(1, 9)),
)


@example(
    [("train", 0.0, 0.0), ("write",), ("roll_back",), ("save",), ("crash", 0, 1)]
)  # the line is older than the save
@given(st.lists(moves, max_size=40))
def test_classes_are_what_happened(story: list[tuple[Any, ...]]) -> None:
    life = Life()
    life.start(0, 2)
    life.clock._warm = None  # compile has a test of its own
    life.write()
    for kind, *rest in story:
        if kind == "crash":
            life.start(*rest)
            life.clock._warm = None
            life.write()
        else:
            getattr(life, kind)(*rest)
    book = life.clock.now()
    assert book.spent == life.sums()
    assert sum(book.spent.values()) == book.until - book.began == life.now - 1000 * NS
    assert book.devices == {k: sum(p.length * p.devices for p in life.intervals if p.kind == k) for k in CLASSES}
    assert life.ledger.images == life.step * BATCH
    assert life.ledger.lost_images == life.lost_images
    life.ledger.held(book)
    assert life.ledger.device_seconds == pytest.approx(sum(p.length * p.devices for p in life.intervals) / NS)
    assert 0 <= life.ledger.lost_device_seconds <= life.ledger.device_seconds


def test_work_is_lost_once_however_many_attempts_begin_at_the_same_save() -> None:
    life = Life()
    life.start(0, 1)
    for _ in range(3):
        life.train(10, 0)
    life.save()
    for _ in range(3):
        for _ in range(2):
            life.train(5, 1)
        life.write()
        life.start(7 * NS, 1)
    book = life.clock.now()
    assert (book.spent["productive"], book.spent["lost"], book.spent["down"]) == (30 * NS, 30 * NS, 21 * NS)
    assert (life.ledger.images, life.ledger.lost_images) == (12, 24)
    assert (book.attempts, book.spent["restart"]) == (4, 12 * NS)


def test_first_steps_are_compared_with_the_third() -> None:
    life = Life()
    life.start(0, 1)
    for took, waited in ((60, 10), (12, 0), (2, 1), (2, 0), (50, 0)):
        life.train(took, waited)
    spent = life.clock.now().spent
    assert (spent["compile"], spent["data"]) == ((49 + 11) * NS, 11 * NS)
    assert spent["productive"] == (1 + 1 + 1 + 2 + 50) * NS


def test_what_a_save_calls_productive_stays_so() -> None:
    life = Life()
    life.start(0, 1)
    life.train(60, 0)
    life.save()
    for _ in range(3):
        life.train(2, 0)
    life.write()
    life.start(0, 1)
    spent = life.clock.now().spent
    assert (spent["productive"], spent["lost"], spent["compile"]) == (60 * NS, 6 * NS, 0)


def test_lines_that_are_missing_are_made_up_by_the_checkpoint() -> None:
    """A run folder without its events, and one whose last lines a power cut took."""
    life = Life()
    life.start(0, 2)
    life.write()
    early = life.line
    life.train(10, 0)
    life.save()
    life.train(10, 0)
    saved = life.saves[1][0]
    for line in (None, early):
        clock = Clock(2, life.now + 5 * NS, line, now=lambda: life.now + 6 * NS)
        clock.go_on(saved)
        book = clock.now()
        assert book.spent == dict.fromkeys(CLASSES, 0) | {
            "productive": 10 * NS, "restart": 4 * NS, "down": 15 * NS,
        }  # fmt: skip
        assert book.until - book.began == 29 * NS
        assert book.attempts == 2


def test_a_clock_that_is_set_back_stands_still() -> None:
    book = Book(10, 10)
    book.advance("productive", 15, 2)
    book.advance("down", 12, 0)
    book.advance("productive", 16, 2)
    assert (book.until, book.spent["productive"], book.spent["down"], book.devices["productive"]) == (16, 6, 0, 12)


def test_metrics_and_summary() -> None:
    book = Book(0, 0, attempts=2)
    book.advance("productive", 75 * NS, 1)
    book.advance("down", 100 * NS, 0)
    values = goodput.metrics(book)
    assert values["perf/goodput"] == 0.75
    assert sum(values[f"goodput/{name}"] for name in CLASSES) == book.wall == 100.0
    assert goodput.summary(book) == (
        "goodput 75.0% of 100.0 s in 2 attempt(s): productive 75.0 s (75.0%), down 25.0 s (25.0%)"
    )


def test_the_file_holds_what_the_clock_had_and_survives_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "events" / "clock.jsonl"
    clock = Clock(3, time.time_ns() - NS)
    journal = Journal(path, clock.line, every=0.01)
    while len(goodput.lines(path)) < 3:
        time.sleep(0.01)
    journal.close()
    last = goodput.last_line(path)
    assert last is not None
    assert last["spent"]["restart"] == last["until"] - last["began"] >= NS
    with path.open("a") as file:
        file.write('{"event": "clock", "beg')  # a kill in the middle of a line
    assert goodput.last_line(path) == last
    with path.open("a") as file:
        file.write("x" * goodput.TAIL)  # and much that is no line
    assert goodput.last_line(path) == last
    Journal(path, clock.line, every=60).close()
    found = goodput.lines(path)
    assert found[-1]["until"] > last["until"]
    assert found[-3] == last


def test_a_disk_that_refuses_does_not_stop_the_thread(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    journal = Journal(tmp_path / "events" / "clock.jsonl", Clock(1, time.time_ns()).line, every=0.01)
    time.sleep(0.05)
    (tmp_path / "events").unlink()
    journal.close()
    assert len(goodput.lines(tmp_path / "events" / "clock.jsonl")) >= 1


def test_an_attempt_begins_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = psutil.Process(os.getpid()).create_time()
    assert goodput.process_began() == pytest.approx(began, abs=1.1)  # psutil knows the boot's time in whole seconds
    monkeypatch.setenv(BEGAN, str(began - 100))
    with goodput.attempt(tmp_path, 2, first=True) as clock:
        assert clock.now().spent["restart"] >= 100 * NS
    with goodput.attempt(tmp_path, 2, first=True) as clock:
        assert clock.now().attempts == 2
        assert clock.book.began == pytest.approx((began - 100) * NS, abs=1000)
    with goodput.attempt(tmp_path, 2, first=False) as clock:
        assert clock.now().attempts == 1
    assert len(goodput.lines(tmp_path / "events" / "clock.jsonl")) == 4
