"""There is always a checkpoint that a rollback can go back to, and not many are kept for it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from configs.guard import Guard
from configs.schema import Checkpoint
from trainer.state.retention import reasons

gaps = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@given(gaps, st.integers(1, 4), st.integers(1, 200))
def test_one_that_is_old_enough_is_kept(gaps: list[int], keep: int, reach: int) -> None:
    wish, now = Checkpoint(keep=keep), 0
    there: list[int] = []
    ever: list[int] = []
    for gap in gaps:
        now += gap
        ever.append(now)
        stay = reasons([*there, now], wish, {}, reach)
        there = sorted(stay)
        old_enough = [step for step in there if step <= now - reach]
        if ever[0] <= now - reach:
            assert old_enough
            assert now - max(old_enough) <= 2 * reach + 2 * max(gaps)
        else:
            assert there[0] == ever[0]
        assert list(stay.values()).count(["guard"]) <= 2
        assert set(ever[-keep:]) <= set(there)


@given(gaps, st.integers(1, 4))
def test_without_rollbacks_none_is_kept_for_them(gaps: list[int], keep: int) -> None:
    steps = [sum(gaps[: number + 1]) for number in range(len(gaps))]
    assert set(reasons(steps, Checkpoint(keep=keep), {}, 0)) == set(steps[-keep:])


def test_rare_saves_need_no_more() -> None:
    assert reasons([1000, 2000, 3000], Checkpoint(keep=2), {}, 110) == {2000: ["newest"], 3000: ["newest"]}
    assert reasons([2000, 3000], Checkpoint(keep=1), {}, 110) == {2000: ["guard"], 3000: ["newest"]}


def test_how_far_a_rollback_reaches() -> None:
    wish = Guard(rollback_steps=10, drift_every=100, divergence_steps=300, drift="continue")
    assert wish.reach == 0
    assert replace(wish, drift="rollback").reach == 100
    assert replace(wish, drift="rollback", drift_every=0).reach == 0
    assert replace(wish, spike="rollback").reach == 10
    assert replace(wish, divergence="rollback", drift="rollback").reach == 310
