"""Requests are noted, agreed on and taken once; the known end of a job is one of them."""

import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.schema import Cluster, Run
from trainer.cluster import Member
from trainer.health import stopping
from trainer.health.stopping import SIGNALS, StopFlag, end_of, margin


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    """A flag whose handlers go away again."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopFlag()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_asked_nothing_agreed(flag: StopFlag, member: Member, tmp_path: Path) -> None:
    flag.watch(tmp_path, math.inf)
    assert not flag.agreed_now(member)
    assert [flag.agreed(member) for _ in range(3)] == [False] * 3
    assert not flag.saves()
    assert list(flag.until(range(3), member)) == [0, 1, 2]
    flag.finish()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_agreed_on_a_step_later_and_stays(number: signal.Signals, flag: StopFlag, member: Member) -> None:
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # changes nothing
    assert [flag.agreed(member) for _ in range(3)] == [False, True, True]
    flag.finish()
    assert flag.reason == number.name


def test_what_is_asked_before_the_first_step_is_agreed_at_once(flag: StopFlag, member: Member) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.agreed_now(member)


def test_the_file_stop_is_seen_and_stays(flag: StopFlag, member: Member, tmp_path: Path) -> None:
    flag.watch(tmp_path, math.inf)
    (tmp_path / "stop").touch()
    assert flag.agreed_now(member)
    assert str(tmp_path / "stop") in flag.reason
    assert (tmp_path / "stop").exists()  # a supervisor reads it after the ranks have left


def test_the_file_save_is_taken_once(
    flag: StopFlag, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "LOOK", 0.0)
    flag.watch(tmp_path, math.inf)
    (tmp_path / "save").touch()
    found = []
    for _ in range(4):
        assert not flag.agreed(member)
        found.append(flag.saves())
    assert found == [False, True, False, False]
    assert not (tmp_path / "save").exists()
    flag.finish()


def test_files_are_looked_for_once_a_second(flag: StopFlag, member: Member, tmp_path: Path) -> None:
    flag.watch(tmp_path, math.inf)
    flag.agreed(member)
    (tmp_path / "save").touch()
    flag._looked = time.monotonic()
    flag.agreed(member)
    assert (tmp_path / "save").exists()
    flag._looked -= stopping.LOOK
    flag.agreed(member)
    assert not (tmp_path / "save").exists()
    flag.finish()


def test_items_end_where_a_stop_is_agreed(flag: StopFlag, member: Member) -> None:
    seen = []
    for item in flag.until(range(10), member):
        seen.append(item)
        if item == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2, 3, 4]
    assert list(flag.until(range(10), member)) == [0]  # at least one
    flag.finish()


def test_the_end_of_the_job_leaves_room_for_a_save(flag: StopFlag, member: Member, tmp_path: Path) -> None:
    assert margin(save=20.0, step=2.0) == 30 + 2 * 20 + 3 * 2
    flag.watch(tmp_path, time.time() + 100)
    assert not flag.agreed_now(member)
    reasons = []
    for seconds in (10.0, 40.0):  # 50 s and 110 s are kept free
        flag._looked = -math.inf
        flag.agreed(member, save=seconds)
        reasons.append(flag.reason)
    assert reasons == ["", "the known end of the job is near"]
    assert flag.agreed(member)
    flag.finish()


def test_before_a_save_was_measured_it_counts_as_long(flag: StopFlag, member: Member, tmp_path: Path) -> None:
    flag.watch(tmp_path, time.time() + stopping.UNMEASURED)
    flag.agreed(member)
    assert flag.agreed(member)
    flag.finish()


def test_who_says_when_the_end_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert end_of(Run()) == math.inf
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795513908")
    assert end_of(Run()) == 1795513908
    run = replace(Run(), cluster=Cluster(end_time="2026-11-24T18:00+01:00"))
    assert end_of(run) == 1795539600
    with pytest.raises(InputError, match=r"cluster.end_time = 'soon': must be a time"):
        Cluster(end_time="soon")
