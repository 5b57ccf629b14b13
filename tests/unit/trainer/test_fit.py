"""The memory estimate against what autograd really keeps, and the refusal that comes from it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import resolve
from configs.errors import InputError
from models import coatnet, norm, spec
from trainer.fit import FIXED, estimate, require_fit, saved_bytes
from trainer.plan import layout


def really_saved(batch: int) -> int:
    """Bytes of the distinct storages that a real fp32 forward pass keeps, parameters aside."""
    model = coatnet.build(spec.get("coatnet-nano"), resolution=64, classes=10, attention="explicit")
    coatnet.initialise(model, 0, "cpu")
    norm.configure(model, group=batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(batch, 3, 64, 64))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("batch", [2, 8])
def test_saved_bytes_are_what_autograd_keeps(batch: int) -> None:
    model = coatnet.build(spec.get("coatnet-nano"), resolution=64, classes=10, attention="explicit")
    assert saved_bytes(model, batch, recompute=False) == pytest.approx(really_saved(batch), rel=0.05)


def test_recomputation_keeps_far_less() -> None:
    model = coatnet.build(spec.get("coatnet3"), resolution=224, classes=10, attention="explicit")
    assert saved_bytes(model, 4, recompute=True) < 0.35 * saved_bytes(model, 4, recompute=False)


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
