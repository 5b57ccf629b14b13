"""The runs from which the planner learns: which they are, and what a rank that has the machine to itself tells."""

from dataclasses import replace

import pytest

from configs import resolve
from trainer.bench import step as bench_step
from trainer.bench.step import Observation
from trainer.plan import layout

RUN = resolve.load("coatnet0-in1k-224")
RUN = replace(RUN, parallel=replace(RUN.parallel, micro_batch=4), cluster=replace(RUN.cluster, device="cpu"))


def observed(ranks: int, seconds: float) -> Observation:
    """A run whose two blocks took so long in each rank."""
    run = next(run for run in bench_step.variants(RUN, 2) if run.cluster.ranks == ranks)
    blocks = {"a": [seconds / 6, seconds / 3], "b": [seconds / 6, seconds / 3]}
    return Observation(run, layout(run, ranks), tuple({"blocks": blocks} for _ in range(ranks)))


def test_every_zero_stage_is_learnt_from_and_one_rank_alone() -> None:
    runs = list(bench_step.variants(RUN, 2))
    assert [run.cluster.ranks for run in runs] == [2] * 9 + [1]
    assert {(run.parallel.zero, layout(run, 2).accumulation) for run in runs[:8]} == {
        (zero, times) for zero in range(4) for times in (1, 2)
    }
    assert all(run.parallel.recompute == "none" and run.parallel.pipeline == 1 for run in runs)
    assert len(list(bench_step.variants(RUN, 1))) == 9
    gpu = replace(RUN, cluster=replace(RUN.cluster, device="cuda"))
    assert {run.cluster.ranks for run in bench_step.variants(gpu, 2)} == {2}


@pytest.mark.parametrize(("together", "apart", "ratio"), [(3.0, 2.0, 1.5), (1.9, 2.0, 1.0)])
def test_how_much_faster_a_rank_is_alone(together: float, apart: float, ratio: float) -> None:
    found = bench_step.alone([observed(2, together)], [observed(1, apart)])
    assert found == pytest.approx(ratio)
