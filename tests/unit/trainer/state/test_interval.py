"""The interval between two saves: as the run says, or Young's."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.state import interval as interval_file
from trainer.state.interval import FIRST, Interval, young


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the interval reads; its first element may be set."""
    now = [100.0]
    monkeypatch.setattr(interval_file, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def chosen(clock: list[float], per_step: float, stall: float, write: float, mtbf_hours: float = 24.0) -> int:
    """What is chosen after ten steps and a save."""
    interval = Interval(0, mtbf_hours)
    interval.begin(0)
    clock[0] += 10 * per_step
    interval.end(10)
    interval.measured(stall, write)
    return interval.wanted()


costs, hours = st.floats(1e-3, 1e3), st.floats(0.1, 1e3)


@given(costs, hours)
def test_no_other_period_loses_less(stall: float, mtbf_hours: float) -> None:
    """C / T of the time goes into saves, and T / 2 of every M is made again."""
    mtbf = mtbf_hours * 3600
    best = young(stall, mtbf)

    def lost(period: float) -> float:
        return stall / period + period / (2 * mtbf)

    assert lost(best) <= min(lost(best * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0)) * (1 + 1e-12)


def test_by_hand(clock: list[float]) -> None:
    """1.8 s of standing still, 10 s of writing and a failure a day: 588 s, which are 196 steps of 3 s."""
    assert young(2.0, 86400.0) == pytest.approx(587.9, abs=0.1)
    assert chosen(clock, per_step=3.0, stall=1.8, write=10.0) == 196
    assert chosen(clock, per_step=3.0, stall=1.8, write=10.0, mtbf_hours=6.0) == 98


def test_a_save_is_written_before_the_next_one_comes(clock: list[float]) -> None:
    assert chosen(clock, per_step=3.0, stall=2.0, write=3000.0) == round(2 * 3002 / 3)
    assert chosen(clock, per_step=1e6, stall=2.0, write=3000.0) == 1


def test_nothing_is_chosen_before_a_save_was_measured(clock: list[float]) -> None:
    interval = Interval(0, 24.0)
    interval.begin(0)
    assert next(step for step in range(1, 2 * FIRST) if interval.due(step)) == FIRST
    clock[0] += 60.0
    interval.end(60)
    assert interval.wanted() == FIRST


def test_a_chosen_one_counts_from_the_last_save() -> None:
    interval = Interval(0, 24.0)
    interval.steps = 7
    interval.begin(10)
    assert [step for step in range(11, 30) if interval.due(step)] == list(range(17, 30))  # until there is one
    assert interval.due(9)  # training was rolled back behind the last save


def test_what_the_run_says_is_kept_to(clock: list[float]) -> None:
    interval = Interval(8, 24.0)
    interval.begin(5)
    clock[0] += 1000.0
    interval.end(8)
    interval.measured(50.0, 50.0)
    assert interval.wanted() == 8
    assert [step for step in range(1, 25) if interval.due(step)] == [8, 16, 24]


def test_a_save_that_costs_nothing_measurable_changes_nothing(clock: list[float]) -> None:
    assert chosen(clock, per_step=1.0, stall=0.0, write=0.0) == FIRST
    assert math.isfinite(chosen(clock, per_step=1e-9, stall=1e-9, write=0.0))
