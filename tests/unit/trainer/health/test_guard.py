"""What the guard judges and decides, from numbers; which batches a run takes; the gate."""

import math
import random
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from configs.errors import InputError
from configs.guard import Guard as Wish
from trainer.engine.gate import Gate
from trainer.health.evidence import checksum
from trainer.health.guard import Guard
from trainer.health.judge import INPUT_STEPS, NOT_COMPARED, Judge, Limits, Row, Verdict, limit
from trainer.state.skips import Skipped

WISH = Wish(window=16)
FINE = Row(0, 1.0, 1.0, 1.0, 0, NOT_COMPARED, NOT_COMPARED, 0.1, 0.0, 0.2)


def feed(judge: Judge, losses: list[float], norms: list[float] | None = None, ranks: int = 1) -> list[Verdict]:
    """All verdicts on steps of these losses and norms, the same on every rank."""
    found = []
    for number, loss in enumerate(losses):
        norm = norms[number] if norms else 1.0
        row = FINE._replace(step=number + 1, loss=loss, norm=norm, healthy=float(math.isfinite(loss + norm)))
        found += judge.judge([row] * ranks, judge.limits())
    return found


def noisy(count: int, level: float = 2.0, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level + draw.gauss(0, 0.05 * level) for _ in range(count)]


VALUES = st.lists(st.floats(0.01, 100), min_size=4, max_size=40)


@given(VALUES, st.floats(1, 20), st.floats(0.001, 10), st.randoms(use_true_random=False))
def test_limit_does_not_depend_on_order_or_scale(
    values: list[float], z: float, scale: float, draw: random.Random
) -> None:
    mixed = draw.sample(values, len(values))
    assert limit(mixed, z, 0.0) == limit(values, z, 0.0)
    assert limit([scale * value for value in values], z, 0.0) == pytest.approx(scale * limit(values, z, 0.0))


@given(VALUES, st.data())
def test_less_than_half_of_the_window_cannot_move_the_limit_far(values: list[float], data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, (len(values) - 1) // 2))
    spoiled = [1e9] * bad + values[bad:]
    good = values[bad:]
    assert limit(spoiled, 10.0, 0.0) <= max(good) + 10 * 1.4826 * (max(good) - min(good)) + 1e-6


def test_limit_of_the_normal_distribution_is_its_z_score() -> None:
    draw = random.Random(1)
    assert limit([draw.gauss(5, 2) for _ in range(20000)], 3.0, 0.0) == pytest.approx(5 + 3 * 2, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_no_spike(seed: int) -> None:
    falling = [8 * math.exp(-number / 60) + loss for number, loss in enumerate(noisy(400, 0.5, seed))]
    norms = [math.exp(draw) for draw in noisy(400, 1.0, seed)]
    assert feed(Judge(replace(WISH, window=64), 1), falling, norms) == []


def test_spike_and_explosion_are_seen_once_and_move_nothing() -> None:
    judge = Judge(WISH, 1)
    norms = [1.0] * 30
    norms[25] = 100.0
    found = feed(judge, [*noisy(20), 9.0, *noisy(9)], norms)
    assert [(verdict.kind, verdict.step, verdict.value) for verdict in found] == [
        ("spike", 21, 9.0),
        ("explosion", 26, 100.0),
    ]
    assert all(verdict.threshold < verdict.value for verdict in found)
    assert judge.limits().loss < 4.5


def test_lasting_change_of_level_is_accepted() -> None:
    found = feed(Judge(replace(WISH, divergence_steps=10**6), 1), noisy(20) + noisy(60, 6.0, seed=1))
    assert 1 <= len(found) < 20
    assert found[-1].step < 60


def test_nothing_is_judged_before_a_quarter_of_the_window() -> None:
    judge = Judge(WISH, 1)
    assert feed(judge, [1.0, 50.0, 1.0]) == []
    assert judge.limits() == Limits()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_its_rank(bad: float) -> None:
    judge = Judge(WISH, 4)
    rows = [FINE._replace(step=7, healthy=0.0, norm=math.inf)] * 4
    rows[2] = rows[2]._replace(loss=bad)
    rows[3] = rows[3]._replace(loss=-bad)
    (verdict,) = judge.judge(rows, judge.limits())
    assert (verdict.kind, verdict.step, verdict.ranks) == ("nonfinite", 7, (2, 3))
    rows = [FINE._replace(step=8, healthy=0.0, norm=math.inf)] * 4
    rows[1] = rows[1]._replace(block=3)
    (verdict,) = judge.judge(rows, judge.limits())
    assert (verdict.value, verdict.ranks) == (math.inf, (1,))


def test_update_held_back_for_its_loss_is_a_spike() -> None:
    row = FINE._replace(step=9, loss=7.0, norm=math.inf, healthy=0.0)
    (verdict,) = Judge(replace(WISH, spike="skip"), 1).judge([row], Limits(5.0, 3.0))
    assert (verdict.kind, verdict.value, verdict.threshold) == ("spike", 7.0, 5.0)
    (verdict,) = Judge(WISH, 1).judge([row], Limits(5.0, 3.0))  # nothing held it back but its gradient
    assert (verdict.kind, verdict.value) == ("nonfinite", math.inf)


def test_steps_in_a_row_that_are_not_finite_are_divergence() -> None:
    found = feed(Judge(WISH, 1), [math.nan] * 4 + [1.0] + [math.nan] * 5)
    assert [verdict.kind for verdict in found].count("nonfinite") == 9
    (diverged,) = [verdict for verdict in found if verdict.kind == "divergence"]
    assert (diverged.step, diverged.since, diverged.value) == (10, 6, 5)


def test_divergence_needs_its_steps_in_a_row() -> None:
    wish = replace(WISH, divergence_steps=20)
    down = [4.0] * 16 + [1.0] * 30
    found = feed(Judge(wish, 1), [*down, *[3.0] * 19, *[1.0] * 20, *[3.0] * 20])
    (diverged,) = [verdict for verdict in found if verdict.kind == "divergence"]
    assert (diverged.since, diverged.step) == (46 + 39 + 1, 46 + 39 + 20)
    assert (diverged.value, diverged.threshold) == (3.0, 2.0)


def test_loss_near_zero_may_waver() -> None:
    wish = replace(WISH, divergence_steps=5)
    assert not [v for v in feed(Judge(wish, 1), [2.0] * 16 + [1e-3] * 40 + [0.3] * 40) if v.kind == "divergence"]


def drift(sums: list[float], replicas: int) -> list[Verdict]:
    judge = Judge(WISH, replicas)
    judge.judge([FINE._replace(step=3, parameters=5.0, buffers=5.0)] * len(sums), Limits())
    return judge.judge([FINE._replace(step=6, parameters=1.0, buffers=value) for value in sums], Limits())


def test_drift_names_the_ranks_outside_the_majority() -> None:
    assert drift([1.0, 1.0, 1.0], 3) == []
    assert drift([1.0, 1.0, 2.0, 2.0], 2) == []  # two stages, which hold different things
    (verdict,) = drift([1.0, 2.0, 1.0], 3)
    assert (verdict.ranks, verdict.since, verdict.step) == ((1,), 4, 6)
    assert drift([1.0, 1.0, 1.0, 4.0, 5.0, 4.0], 3)[0].ranks == (4,)
    assert drift([1.0, 2.0], 2)[0].ranks == (0, 1)  # nobody knows which


def slow(times: list[list[float]], replicas: int) -> list[tuple[int, tuple[int, ...]]]:
    judge = Judge(WISH, replicas, noise=0.005)
    found = []
    for step, row in enumerate(times, 1):
        found += judge.judge([FINE._replace(step=step, compute=seconds) for seconds in row], Limits())
    return [(verdict.step, verdict.ranks) for verdict in found]


def test_slow_rank_is_slow_three_times_running() -> None:
    even, late = [0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.14, 0.1]
    assert slow([late, late, even, late, late, even], 4) == []
    assert slow([late] * 6, 4) == [(3, (2,))]
    assert slow([late] * 3 + [even] + [late] * 3, 4) == [(3, (2,)), (7, (2,))]
    assert slow([[0.1, 0.2]] * 4, 2) == [(3, (1,))]
    assert slow([[0.1, 0.1, 0.9, 0.9]] * 4, 2) == []  # the stages of a pipeline differ
    assert slow([[0.001, 0.002]] * 9, 2) == []  # too little to tell


def test_input_bound_run_is_told_once() -> None:
    judge = Judge(WISH, 1)
    found = []
    for step in range(1, 4 * INPUT_STEPS):
        waits = step <= 2 * INPUT_STEPS
        found += judge.judge([FINE._replace(step=step, waited=0.15 if waits else 0.01)], Limits())
    (verdict,) = found
    assert (verdict.kind, verdict.step) == ("input_bound", INPUT_STEPS)
    assert verdict.value == pytest.approx(0.75)


@given(st.integers(1, 60), st.integers(0, 1000))
def test_state_goes_on_as_if_nothing_had_happened(cut: int, seed: int) -> None:
    losses = noisy(60, seed=seed)
    losses[40] = 30.0
    through, halved = Judge(WISH, 1), Judge(WISH, 1)
    expected = feed(through, losses)
    found = feed(halved, losses[:cut])
    again = Judge(WISH, 1)
    again.restore(halved.state())
    found += [
        replace(verdict, step=verdict.step + cut, since=verdict.since + cut) for verdict in feed(again, losses[cut:])
    ]
    assert found == expected
    assert again.state() == through.state()


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=8)


@given(RANGES, st.integers(0, 50), st.integers(0, 50))
def test_batches_taken_are_those_not_skipped(ranges: list[tuple[int, int]], update: int, count: int) -> None:
    skipped = Skipped((first, first + length) for first, length in ranges)
    left_out = {batch for first, length in ranges for batch in range(first, first + length)}
    taken = [batch for batch in range(400) if batch not in left_out]
    assert [skipped.batch(number) for number in range(update, update + count)] == taken[update : update + count]
    pieces = list(skipped.stretches(update, count))
    assert [batch for first, length in pieces for batch in range(first, first + length)] == taken[
        update : update + count
    ]
    assert all(length > 0 for _, length in pieces)
    assert [skipped.update(batch) for batch in taken] == list(range(len(taken)))
    assert all(skipped.update(batch) is None for batch in left_out)
    assert Skipped(skipped.state()).ranges == skipped.ranges
    assert all(before[1] < after[0] for before, after in zip(skipped.ranges, skipped.ranges[1:], strict=False))


def test_budget_is_for_each_kind_and_for_a_while() -> None:
    guard = Guard.__new__(Guard)
    guard.wish, guard._used = Wish(nonfinite="skip", spike="rollback", budget=2, budget_steps=100), {}

    def decide(kind: str, step: int) -> str:
        return guard.decide(Verdict(kind, step, 1.0, 0.0))[0]  # type: ignore[arg-type]

    assert [decide("nonfinite", step) for step in (1, 50, 90, 102, 120)] == ["skip", "skip", "stop", "skip", "stop"]
    assert [decide("spike", step) for step in (91, 92, 93)] == ["rollback", "rollback", "stop"]
    assert [decide("slow_rank", step) for step in range(5)] == ["continue"] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@given(place=st.integers(0, 59), bit=st.integers(0, 15))
def test_checksum_sees_any_bit(dtype: torch.dtype, place: int, bit: int) -> None:
    value = torch.arange(60).to(dtype).view(3, 4, 5).transpose(0, 2)
    other = value.clone()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    flipped = torch.tensor(1 << bit).to(whole)
    other.view(whole)[place % 5, place // 5 % 4, place // 20] ^= flipped
    device = torch.device("cpu")
    same = checksum({"a": value, "b": value}, device)
    assert checksum({"a": value.clone(), "b": value}, device) == same
    assert checksum({"a": other, "b": value}, device) != same
    assert checksum({"a": value, "b": other}, device) != same
    assert checksum({}, device) == 0


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (logits * targets).mean()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gate_closes_on_a_loss_that_is_not_finite_though_its_gradient_is(bad: float) -> None:
    weight = nn.Parameter(torch.ones(4))
    gate = Gate(lambda logits, targets: loss_of(logits, targets) + bad, 1, math.inf, None)
    loss = gate(weight * 2, torch.ones(4))
    assert not torch.isfinite(loss)
    torch.autograd.backward(loss)
    assert weight.grad is not None
    assert weight.grad.isnan().all()


def test_open_gate_changes_no_bit() -> None:
    values, targets = torch.randn(50), torch.randn(50)
    plain, gated = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    torch.autograd.backward(loss_of(plain, targets))
    loss = Gate(loss_of, 2, math.inf, None)(gated, targets)
    assert torch.equal(loss, loss_of(values, targets))
    torch.autograd.backward(loss)
    assert torch.equal(cast(torch.Tensor, plain.grad), cast(torch.Tensor, gated.grad))


def test_settings_that_would_not_leave_out_the_bad_batch_are_refused() -> None:
    with pytest.raises(InputError, match=r"guard.skip_batches = 10: .*nearest valid: 11"):
        Wish(rollback_steps=10, skip_batches=10)
    assert Wish(rollback_steps=0, skip_batches=1).skip_batches == 1
