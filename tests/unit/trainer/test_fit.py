"""The memory estimate, and the refusal that comes from it."""

from dataclasses import replace
from typing import Any

import pytest

from configs import resolve
from configs.errors import InputError
from models import spec
from models.activations import Dtype, Recompute, activations, peak
from trainer.fit import FIXED, estimate, require_fit
from trainer.plan import layout


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_those_of_the_micro_batch(recompute: Recompute, dtype: Dtype) -> None:
    # That a real pass keeps as many is held by tests/numerics/test_saved_bytes.py.
    run = resolve.load("coatnet0-in1k-224")
    run = replace(
        run,
        parallel=replace(run.parallel, recompute=recompute, micro_batch=128),
        precision=replace(run.precision, dtype=dtype),
        cluster=replace(run.cluster, device="cpu"),
    )
    blocks = activations(
        spec.get("coatnet0"), 224, batch=128, dtype=dtype, recompute=recompute, attention="explicit", classes=10
    )
    assert estimate(run, layout(run, 8), 10).activations == peak(blocks)


def test_states_follow_the_stage() -> None:
    run = resolve.load("coatnet5-jft300m-224")
    parameters = 688e6
    states: dict[Any, float] = {}
    for stage in (0, 1, 2, 3):
        staged = replace(run, parallel=replace(run.parallel, zero=stage))
        states[stage] = estimate(staged, layout(staged, 64), 1000).states / parameters
    assert states[0] == pytest.approx(16, rel=0.02)
    assert states[1] == pytest.approx(8 + 12 / 64, rel=0.02)
    assert states[2] == pytest.approx(4 + 16 / 64, rel=0.02)
    assert states[3] == pytest.approx(16 / 64, rel=0.02)


def test_too_large_is_refused_with_what_would_fit() -> None:
    run = resolve.load("coatnet0-in1k-224")
    plan = layout(run, 8)
    with pytest.raises(InputError) as refused:
        require_fit(run, plan, 1000, 16_000_000_000)
    for word in (
        "parallel.micro_batch = 512",
        "8 ranks",
        "there are 16.0",
        "--parallel.recompute full",
        "micro-batch 128",
    ):
        assert word in str(refused.value)
    small = replace(run, parallel=replace(run.parallel, micro_batch=128))
    assert FIXED < require_fit(small, layout(small, 8), 1000, 16_000_000_000).total < 16_000_000_000


def test_the_cheapest_recomputation_that_fits_is_named() -> None:
    run = resolve.load("coatnet0-in1k-224")
    kinds: tuple[Recompute, ...] = ("none", "selective", "full")
    runs = {kind: replace(run, parallel=replace(run.parallel, recompute=kind)) for kind in kinds}
    plan = layout(run, 8)
    none, selective, full = (estimate(runs[kind], plan, 1000).total for kind in kinds)
    assert full < selective < none
    with pytest.raises(InputError, match="recompute selective"):
        require_fit(runs["none"], plan, 1000, selective)
    assert require_fit(runs["selective"], plan, 1000, selective).total == selective
    with pytest.raises(InputError, match="recompute full"):
        require_fit(runs["none"], plan, 1000, selective - 1)
    with pytest.raises(InputError, match=r"micro-batch (\d+) or less") as refused:
        require_fit(runs["full"], plan, 1000, full - 1)
    named = int(str(refused.value).rpartition("micro-batch ")[2].split()[0])
    assert require_fit(runs["full"], replace(plan, micro_batch=named), 1000, full - 1).total < full
