"""The formulas of models/activations.py against the bytes that a real training pass on a CPU holds.

Fused attention on CUDA and autocast's fp32 LayerNorm there cannot be measured here.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import coatnet, spec
from models.activations import Dtype, Recompute, activations
from models.coatnet import CoAtNet
from models.design import Spec
from trainer.bench.held_bytes import Storages, held_bytes
from trainer.engine.recompute import run_block

BATCH = 2
KINDS: tuple[Recompute, ...] = ("none", "selective", "full")
Backend = Literal["explicit", "sdpa"]


def narrow(name: str, divisor: int, head_size: int, **changes: Any) -> Spec:
    """A model of the family with all its blocks, each narrower."""
    found = spec.get(name)
    stages = tuple(replace(stage, width=stage.width // divisor) for stage in found.stages)
    return replace(found, stages=stages, head_size=head_size, **changes)


def network(found: Spec, resolution: int, attention: Backend) -> CoAtNet:
    """A network of `found` with torch's own initial weights: bytes do not depend on values."""
    model = coatnet.build(found, resolution=resolution, classes=10, attention=attention, device="cpu")
    return model.to(memory_format=torch.channels_last)


def by_stage(blocks: dict[str, int]) -> Counter[str]:
    stages: Counter[str] = Counter()
    for name, size in blocks.items():
        stages[name.split(".")[1]] += size
    return stages


def check(found: Spec, resolution: int, attention: Backend, dtypes: tuple[Dtype, ...] = ("fp32", "bf16")) -> None:
    """Measured and counted bytes agree within 2 %, over the network and in every stage."""
    model = network(found, resolution, attention)
    for dtype in dtypes:
        for kind in KINDS:
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False)
            measured = held_bytes(model, BATCH, run_block(kind), autocast)
            counted = {
                block.name: block.saved
                for block in activations(
                    found, resolution, batch=BATCH, dtype=dtype, recompute=kind, attention=attention, classes=10
                )
            }
            case = (found.name, attention, dtype, kind)
            assert counted.keys() == measured.keys(), case
            assert sum(counted.values()) == pytest.approx(sum(measured.values()), rel=0.02), case
            stages = by_stage(measured)
            for stage, size in by_stage(counted).items():
                assert size == pytest.approx(stages[stage], rel=0.02), (*case, stage)


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_coatnet0_at_224(attention: Backend) -> None:
    check(spec.get("coatnet0"), 224, attention)


def test_a_deep_model_with_the_strides_in_the_depthwise_convolutions() -> None:
    check(narrow("coatnet4", 6, 32, stride="depthwise"), 96, "explicit")


@pytest.mark.slow
def test_a_deep_model_at_its_own_width() -> None:
    check(spec.get("coatnet4"), 96, "explicit")


def test_the_shape_of_coatnet6() -> None:
    check(narrow("coatnet6", 16, 16), 64, "explicit")


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("relative_bias", ["post", "none"])
def test_other_forms_of_the_relative_bias(relative_bias: str, attention: Backend) -> None:
    check(narrow("coatnet0", 2, 32, relative_bias=relative_bias), 128, attention)


def test_layer_norm_in_mbconv() -> None:
    check(narrow("coatnet0", 2, 32, conv_norm="layer"), 128, "explicit")


def hooked_bytes(model: CoAtNet, dtype: Dtype) -> int:
    """Bytes of the distinct storages that autograd's nodes save, by its own hooks; parameters and buffers aside."""
    static = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in static:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    pictures = torch.randn(BATCH, 3, *model.resolution).to(memory_format=torch.channels_last)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(pictures)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_held_is_what_autograd_saves(dtype: Dtype) -> None:
    model = network(narrow("coatnet0", 2, 32), 64, "explicit")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False)
    assert sum(held_bytes(model, BATCH, None, autocast).values()) == hooked_bytes(model, dtype)


@pytest.mark.parametrize(("recomputed", "values"), [(False, 8 + 16 + 16), (True, 8)])
def test_the_measure_on_a_known_case(recomputed: bool, values: int) -> None:
    # Linear(8, 16), GELU, Linear(16, 4): the inputs of all three, or under a checkpoint the first input alone.
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    call: Callable[[Tensor], Any] = (lambda x: checkpoint(layers, x, use_reentrant=False)) if recomputed else layers
    with Storages() as storages:
        storages.owner = "all"
        x = torch.randn(5, 8)
        loss = call(x).sum()
        storages.hand_over(loss, "loss")
        del x
    assert storages.alive(layers)["all"] == 4 * 5 * values
    loss.backward()
    assert storages.alive(layers)["all"] == 0
