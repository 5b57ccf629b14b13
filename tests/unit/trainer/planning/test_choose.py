"""Every layout that is looked at can be trained; the best is the fastest; the words say what it is."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from configs import resolve
from configs.schema import Run
from trainer.plan import layout
from trainer.planning import fit, memory, roofline, step_time
from trainer.planning.choose import Candidate, Planner

from .conftest import machines_of, planner_of, rates_of


def settings_of(one: Candidate) -> tuple[Any, ...]:
    parallel = one.parallel
    return (
        parallel.pipeline, parallel.zero, parallel.shard_group, parallel.recompute, one.layout.micro_batch,
        parallel.offload, parallel.compile,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> list[Candidate]:
    return planner_of("coatnet7-jft3b-224", 16, classes=18291).candidates()


def test_every_candidate_is_a_layout_that_the_trainer_takes(found: list[Candidate]) -> None:
    run = resolve.load("coatnet7-jft3b-224")
    assert len({settings_of(one) for one in found}) == len(found)
    for one in found:
        asked = replace(run, parallel=one.parallel, cluster=replace(run.cluster, device="cuda"))
        plan = layout(asked, 16)
        assert plan == one.layout
        if (one.layout.micro_batch, one.parallel.compile) == (256, False):
            resolve.check(asked)
            assert fit.estimate(asked, plan, 18291) == one.memory


def test_all_settings_are_looked_at(found: list[Candidate]) -> None:
    values = list(zip(*map(settings_of, found), strict=True))
    assert set(values[0]) == {1, 2, 4, 8, 16}
    assert set(values[1]) == {0, 1, 2, 3}
    assert set(values[2]) == {0, 8}
    assert set(values[3]) == {"none", "selective", "full"}
    assert set(values[5]) == {"none", "cpu"}
    assert set(values[6]) == {False, True}
    for _, zero, group, recompute, _, _, compiled in map(settings_of, found):
        assert not (compiled and (zero == 3 or recompute == "selective"))
        assert not (group and zero < 3)


def test_the_best_is_the_fastest_that_fits() -> None:
    planner = planner_of("coatnet5-jft300m-224", 16)
    found = planner.candidates()
    best = planner.best()
    assert best is not None
    assert best.time is not None
    assert best.time.total == min(one.time.total for one in found if one.time is not None)
    assert best.memory.total <= planner.machines.available
    for one in found:
        assert (one.time is None) == (one.memory.total > planner.machines.available)


def test_less_memory_makes_room_by_recomputing_and_cutting_states_up() -> None:
    large = planner_of("coatnet7-jft3b-224", 16).best()
    small = planner_of("coatnet7-jft3b-224", 16, gpu="a10").best()
    assert large is not None
    assert small is not None
    assert large.memory.total > 0.92 * 24e9 > small.memory.total
    assert (small.parallel.recompute, small.parallel.zero, small.layout.micro_batch) != (
        large.parallel.recompute, large.parallel.zero, large.layout.micro_batch
    )  # fmt: skip


def test_the_same_question_of_other_numbers_of_devices(small: Run) -> None:
    planner = Planner(small, 1000, machines_of(8), rates_of())
    for count in (1, 4, 16):
        other = planner.on(count)
        again = Planner(small, 1000, machines_of(8).of(count), rates_of())
        assert [settings_of(one) for one in other.candidates()] == [settings_of(one) for one in again.candidates()]
    wider = planner.on(16, 512)
    assert {one.layout.global_batch for one in wider.candidates()} == {512}
    assert {one.layout.global_batch for one in planner.candidates()} == {256}  # as it was


def test_batches_that_no_ranks_divide_have_no_layout(small: Run) -> None:
    planner = Planner(small, 1000, machines_of(31, per_node=31), rates_of())
    assert planner.candidates() == []
    assert planner.best() is None
    assert not planner.fits()


@pytest.mark.parametrize(("gpu", "count"), [("a10", 1), ("a100-40gb", 1), ("a100-40gb", 2), ("h100", 1)])
def test_what_fits_is_what_some_layout_fits(gpu: str, count: int) -> None:
    planner = planner_of("coatnet5-jft300m-224", count, 18_291, gpu)
    best = planner.best()
    assert planner.fits() == (best is not None)
    if (gpu, count) == ("a100-40gb", 1):  # with AdamW's state in the host's memory only
        assert best is not None
        assert best.parallel.offload == "cpu"


def test_words_name_what_differs_from_the_plainest() -> None:
    planner = planner_of("coatnet7-jft3b-224", 64)
    found = planner.candidates()
    plain = next(one for one in found if settings_of(one) == (1, 1, 0, "none", 64, "none", True))
    assert plain.words() == "ZeRO-1, recompute none, micro-batch 64, compiled"
    grouped = next(one for one in found if settings_of(one)[:5] == (1, 3, 8, "full", 32))
    assert grouped.words() == "ZeRO-3 in groups of 8, recompute full, micro-batch 32"
    staged = next(one for one in found if settings_of(one)[:5] == (2, 1, 0, "selective", 32))
    assert staged.words().startswith("pipeline 2, ZeRO-1, recompute selective, micro-batch 32")


@pytest.mark.parametrize("recipe", ["coatnet0-in1k-224", "coatnet7-jft3b-224"])
def test_more_devices_make_no_more_work(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's memory is counted once for each layout, and a kind of block timed once for each micro-batch and style.

    Neither depends on how many ranks there are: 4,096 GPUs take at most as much as 64 and a tenth.
    """
    called: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*given: Any, **named: Any) -> Any:
            called[name] += 1
            return function(*given, **named)

        monkeypatch.setattr(module, name, counting)

    counted(memory, "of_stage")
    counted(roofline, "of_block")
    counted(step_time, "of_layout")
    calls = {}
    for count in (64, 4096):
        called.clear()
        planner = planner_of(recipe, count)
        found = planner.candidates()
        assert called["of_stage"] == sum(one.layout.stages for one in found)
        assert called["of_layout"] == sum(one.time is not None for one in found)
        timed = {(one.layout.micro_batch, one.parallel.compile) for one in found if one.time is not None}
        kinds = {
            compiled: len({block.operations for block in planner.pace.operations("compiled" if compiled else "eager")})
            for compiled in (False, True)
        }
        assert called["of_block"] == sum(kinds[compiled] for _, compiled in timed)  # equal blocks are timed once
        calls[count] = dict(called)
    for name, few in calls[64].items():
        assert calls[4096][name] <= 1.1 * few, name


def test_a_style_without_rates_is_not_looked_at(small: Run) -> None:
    rates = rates_of()
    planner = Planner(small, 1000, machines_of(8), rates, ("eager",))
    assert not any(one.parallel.compile for one in planner.candidates())
    pinned = replace(small.parallel, compile=True, zero=1, recompute="none")
    assert planner.seconds(pinned, layout(replace(small, parallel=pinned), 8)).total > 0  # but can be asked for
