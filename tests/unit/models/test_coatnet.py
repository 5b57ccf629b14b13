"""The network: what it is built of, shapes and layouts at block boundaries, initial weights, stochastic depth."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import InputError
from models import coatnet, cost, drop_path, norm, spec
from models.coatnet import CoAtNet
from models.spec import SPECS, Spec, Stage, Stride

NANO = spec.get("coatnet-nano")
# -6's and -7's third stage in small: MBConv, then Transformer blocks of another width at the same resolution.
SPLIT = Spec(
    "split",
    (
        Stage("s0", "stem", 2, 8),
        Stage("s1", "mbconv", 1, 8),
        Stage("s2", "mbconv", 1, 16),
        Stage("s3a", "mbconv", 2, 24),
        Stage("s3b", "transformer", 2, 32, stride=1),
        Stage("s4", "transformer", 1, 32),
    ),
    head_size=8,
)
# Neither a pool nor a change of width where convolution hands over to attention.
EQUAL = replace(SPLIT, stages=tuple(replace(s, width=32) if s.name == "s3a" else s for s in SPLIT.stages))
CONVOLUTION_ONLY = replace(NANO, stages=tuple(replace(s, block="mbconv") if s.name > "s0" else s for s in NANO.stages))
ATTENTION_FIRST = replace(
    NANO, stages=tuple(replace(s, block="transformer") if s.name > "s1" else s for s in NANO.stages)
)


def made(which: Spec = NANO, resolution: spec.Resolution = 64, **options: Any) -> CoAtNet:
    model = coatnet.build(which, resolution=resolution, classes=10, **options)
    coatnet.initialise(model, 0, "cpu")
    return model


@pytest.mark.parametrize("stride", ["expansion", "depthwise"])
@pytest.mark.parametrize("name", list(SPECS))
def test_every_block_has_the_counted_parameters(name: str, stride: Stride) -> None:
    model = coatnet.build(SPECS[name], resolution=(256, 224), classes=123, stride=stride)
    built = [(name, sum(weight.numel() for weight in block.parameters())) for name, block in model.flat]
    counted = cost.count(SPECS[name], (256, 224), stride, 123).blocks
    assert built == [(block.name, block.parameters) for block in counted]


@pytest.mark.parametrize("stride", ["expansion", "depthwise"])
@pytest.mark.parametrize(("name", "resolution"), [("coatnet-nano", (64, 96)), ("coatnet7", 224)])
def test_multiply_adds_are_those_of_the_operations(name: str, resolution: spec.Resolution, stride: Stride) -> None:
    model = coatnet.build(spec.get(name), resolution=resolution, classes=1000, stride=stride, attention="explicit")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, *model.resolution, device="meta"))
    assert counter.get_total_flops() == 2 * cost.count(spec.get(name), resolution, stride).multiply_adds


def test_parameters_are_named_by_stage_index_and_path() -> None:
    names = set(dict(made().named_parameters()))
    assert {"blocks.s0.0.conv1.weight", "blocks.s3.2.attention.qkv.weight", "blocks.head.0.classifier.bias"} <= names
    assert dict(made().named_parameters())["blocks.s3.1.attention.table"].shape == (4, 7, 7)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("which", [NANO, SPLIT, EQUAL, CONVOLUTION_ONLY, ATTENTION_FIRST])
def test_boundaries_are_contiguous_in_their_own_layout(which: Spec, memory_format: torch.memory_format) -> None:
    seen: list[tuple[int, ...]] = []

    def run(block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
        y: Tensor = block(x, drop)
        assert y.is_contiguous(memory_format=memory_format if y.dim() == 4 else torch.contiguous_format)
        seen.append(tuple(y.shape[1:]))
        return y

    model = made(which, (64, 96))
    model(torch.randn(2, 3, 64, 96).to(memory_format=memory_format), run=run)
    expected: list[tuple[int, ...]] = []
    for block in which.blocks((64, 96))[:-1]:
        height, width = block.grid
        tokens = block.kind == "transformer"
        expected.append((height * width, block.width) if tokens else (block.width, height, width))
    assert seen == [*expected, (10,)]


@pytest.mark.parametrize("which", [NANO, SPLIT])
def test_bf16_autocast_stays_close_and_trains_every_weight(which: Spec) -> None:
    model = made(which)
    x = torch.randn(8, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x.to(memory_format=torch.channels_last))
    assert logits.dtype == torch.bfloat16
    exact = model(x).detach()
    assert torch.allclose(logits.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_float64_and_memory_format_do_not_change_the_function() -> None:
    model = made().double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    plain, last = model(x), model(x.to(memory_format=torch.channels_last))
    assert plain.dtype == torch.float64
    assert torch.allclose(plain, last, rtol=0, atol=1e-13)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = made(), made(), coatnet.build(NANO, resolution=64, classes=10)
    coatnet.initialise(other, 1, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    table = "blocks.s3.1.attention.table"
    assert not torch.equal(first.get_parameter(table), other.get_parameter(table))
    alone = coatnet.build(replace(NANO, name="other"), resolution=64, classes=7, device="cpu")
    name, block = alone.flat[5]
    coatnet.initialise_block(name, block, 0, NANO.kernel_std)
    for path, weight in block.named_parameters():
        assert torch.equal(weight, first.get_parameter(f"{name}.{path}")), path


def test_initial_weights_are_the_papers() -> None:
    model = coatnet.build(spec.get("coatnet0"), resolution=64, classes=10)
    coatnet.initialise(model, 3, "cpu", head_bias=-4.5)
    kernels = torch.cat([w.detach().flatten() for n, w in model.named_parameters() if w.dim() >= 2])
    assert float(kernels.std()) == pytest.approx(0.02, rel=0.01)
    assert abs(float(kernels.mean())) < 1e-4
    vectors = {n: w for n, w in model.named_parameters() if w.dim() == 1}
    head = vectors.pop("blocks.head.0.classifier.bias")
    assert torch.equal(head, torch.full_like(head, -4.5))
    for name, vector in vectors.items():
        assert torch.equal(vector, torch.full_like(vector, float(name.endswith("weight")))), name
    draws = [w for n, w in model.named_parameters() if n.endswith("widen.weight") and ".s3." in n]
    assert not any(torch.equal(a, b) for a, b in pairwise(draws))


def test_a_forgotten_weight_is_found() -> None:
    model = coatnet.build(NANO, resolution=64, classes=10)
    model.flat[2][1].register_parameter("gamma", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(RuntimeError, match=r"no initial value for blocks\.s2\.0\.gamma"):
        coatnet.initialise(model, 0, "cpu")


def test_stochastic_depth_scales_the_right_branches() -> None:
    model = made(drop_path=0.4).double().eval()
    blocks = 2 + 1 + 4
    assert model.drop_rates[:3] == pytest.approx([0, 0.4 / blocks, 0.8 / blocks])
    assert model.drop_rates[-2:] == pytest.approx([0.4 * 6 / blocks] * 2)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    ones = torch.ones(len(model.drop_rates), 3)
    assert torch.allclose(model(x, ones), model(x), rtol=0, atol=1e-13)
    for layer in range(len(model.drop_rates)):
        factors = ones.clone()
        factors[layer, 1] = 0
        changed = (model(x, factors) - model(x)).abs().amax(1) > 1e-12
        assert changed.tolist() == [False, True, False], layer


def test_a_dropped_block_is_its_identity() -> None:
    model = made().eval()
    x = torch.randn(2, 64, 16).transpose(1, 2).contiguous()
    _, block = model.flat[6]
    assert torch.equal(block(x, torch.zeros(2, 2)), x)
    assert not torch.equal(block(x, torch.ones(2, 2)), x)


def test_factors_of_the_whole_network_fit_forward() -> None:
    model = made(drop_path=0.5)
    factors = drop_path.scales(torch.arange(4), model.drop_rates)
    assert model(torch.randn(4, 3, 64, 64), factors).shape == (4, 10)
    with pytest.raises(ValueError, match="factors"):
        model(torch.randn(4, 3, 64, 64), factors[:-1])
    with pytest.raises(ValueError, match="pictures"):
        model(torch.randn(4, 3, 32, 64))


def test_recomputed_blocks_change_no_bit() -> None:
    def recompute(block: Callable[..., Any], x: Tensor, drop: Tensor | None) -> Tensor:
        result: Tensor = checkpoint(
            block, x, drop, use_reentrant=False, context_fn=lambda: (nullcontext(), norm.recomputing())
        )
        return result

    found: list[list[Tensor]] = []
    for run in (None, recompute):
        model = made(SPLIT, drop_path=0.5)
        norm.configure(model, group=4)
        factors = drop_path.scales(torch.arange(8), model.drop_rates)
        x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        logits = model(x, factors, run)
        logits.square().sum().backward()
        norm.commit(model)
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        found.append([logits, *gradients, *model.buffers()])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_build_refuses_what_does_not_divide() -> None:
    with pytest.raises(InputError, match="nearest valid: 224"):
        coatnet.build(NANO, resolution=225, classes=10)
    with pytest.raises(ValueError, match="head size 48"):
        coatnet.build(replace(NANO, head_size=48), resolution=64, classes=10)


@pytest.mark.parametrize("which", [NANO, SPLIT])
@pytest.mark.parametrize("ends", [(1,), (4,), (6,), (2, 5, 7), (1, 2, 3, 4, 5, 6, 7)])
def test_a_chain_of_parts_is_the_whole(which: Spec, ends: tuple[int, ...]) -> None:
    whole = made(which, drop_path=0.5)
    names = [name for name, _ in whole.flat]
    cuts = list(pairwise((0, *ends, len(names))))
    parts = []
    for first, last in cuts:
        part = coatnet.build(which, resolution=64, classes=10, drop_path=0.5)
        part.cut(first, last)
        coatnet.initialise(part, 0, "cpu")
        assert ([name for name, _ in part.flat], part.part) == (names[first:last], (first, last))
        parts.append(part)
    for model in (whole, *parts):
        norm.configure(model, group=4)
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(8, 3, 64, 64, generator=draw).contiguous(memory_format=torch.channels_last)
    factors = drop_path.scales(torch.arange(8), whole.drop_rates)

    logits = whole(x, factors)
    logits.square().sum().backward()
    entered, left = [], []
    y = x
    for part in parts:
        entered.append(y.detach().requires_grad_())  # as it comes from another rank
        y = part(entered[-1], factors)
        left.append(y)
    assert torch.equal(y, logits)
    torch.autograd.backward(y.square().sum())
    for output, following in zip(left[-2::-1], entered[:0:-1], strict=True):
        gradient = following.grad
        assert gradient is not None
        torch.autograd.backward([output], [gradient])
    norm.commit(whole)
    for part in parts:
        norm.commit(part)

    own = [name for part in parts for name, _ in part.named_parameters()]
    assert own == [name for name, _ in whole.named_parameters()]
    for part in parts:
        for name, weight in part.named_parameters():
            gradient = whole.get_parameter(name).grad
            assert gradient is not None
            assert weight.grad is not None
            assert torch.equal(weight.grad, gradient), name
        for name, buffer in part.named_buffers():
            assert torch.equal(buffer, whole.get_buffer(name)), name


def test_cuts_lie_inside_the_third_stage_too() -> None:
    assert [name for name, _ in made(NANO).flat][6] == "blocks.s3.2"
    assert [name for name, _ in made(SPLIT).flat][6] == "blocks.s3b.1"


@pytest.mark.parametrize(("first", "last"), [(3, 3), (-1, 4), (5, 10), (4, 2)])
def test_what_is_no_part_is_refused(first: int, last: int) -> None:
    model = made()
    with pytest.raises(ValueError, match="no part"):
        model.cut(first, last)
    assert len(model.flat) == 9
    model.cut(2, 5)
    with pytest.raises(ValueError, match="no part"):  # what is left is not the whole list
        model.cut(0, 2)
