"""What selective recomputation, exact stochastic depth and compilation may change: nothing but time and memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import coatnet, drop_path, norm, spec
from models.attention import kept_biases
from models.coatnet import CoAtNet
from models.spec import Spec
from trainer.engine.recompute import run_block

NANO = spec.get("coatnet-nano")
VARIANTS = {
    "nano": NANO,
    "post": replace(NANO, relative_bias="post"),
    "none": replace(NANO, relative_bias="none"),
    "layer": replace(NANO, conv_norm="layer"),
    "depthwise": replace(NANO, stride="depthwise"),
}


def made(which: Spec, **options: Any) -> CoAtNet:
    model = coatnet.build(which, resolution=64, classes=10, drop_path=0.5, **options)
    coatnet.initialise(model, 0, "cpu")
    norm.configure(model, group=4)
    return model.train().to(memory_format=torch.channels_last)


def trained(model: CoAtNet, drop: Tensor | None, recompute: str = "none", bf16: bool = False) -> dict[str, Tensor]:
    """Logits, gradients and statistics of one step."""
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        logits = model(x, drop, run_block(recompute))
    torch.autograd.backward(logits.float().square().sum())
    norm.commit(model)
    found = {"logits": logits.detach(), "pictures": x.grad} | {n: p.grad for n, p in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_is_bitwise(name: str, recompute: str, bf16: bool) -> None:
    model = made(VARIANTS[name])
    drop = drop_path.scales(torch.arange(8), model.drop_rates)
    plain = trained(model, drop, bf16=bf16)
    again = trained(made(VARIANTS[name]), drop, recompute, bf16)
    assert plain.keys() == again.keys()
    assert plain["blocks.s1.0.norm_in.weight"].abs().sum() > 0
    for tensor, value in plain.items():
        assert torch.equal(again[tensor], value), tensor


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["nano", "post"])
def test_branches_that_are_left_out_were_multiplied_by_zero(name: str, recompute: str) -> None:
    which = replace(VARIANTS[name], stages=tuple(replace(s, depth=max(2, s.depth)) for s in NANO.stages))
    computed, skipping = made(which).double(), made(which, drop_group=4).double()
    factors = drop_path.scales(torch.arange(8), computed.drop_rates, 4)
    assert (factors[-1] == 0).sum() == 2 * drop_path.dropped(computed.drop_rates[-1], 4) == 4
    seen = []
    for model in (computed, skipping):
        rows: list[int] = []
        feed = model.get_submodule("blocks.s4.1.widen")
        feed.register_forward_hook(lambda module, inputs, output, rows=rows: rows.append(len(output)))
        x = torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        logits = model(x, factors.double(), run_block(recompute))
        torch.autograd.backward(logits.square().sum())
        seen.append((rows[0], logits, {n: p.grad for n, p in model.named_parameters()}))
    (every, expected, gradients), (some, found, others) = seen
    assert (every, some) == (8, 4)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    for parameter, gradient in gradients.items():
        other = others[parameter]
        assert gradient is not None
        assert other is not None
        assert torch.allclose(other, gradient, rtol=1e-9, atol=1e-11), parameter


def test_equal_blocks_are_compiled_once() -> None:
    deeper = replace(NANO, stages=tuple(replace(s, depth=s.depth + 3) for s in NANO.stages))
    plain, compiled = made(deeper), made(deeper)
    coatnet.compile_blocks(compiled, backend="aot_eager")
    drop = drop_path.scales(torch.arange(8), plain.drop_rates)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    expected = trained(plain, drop)
    for _ in range(2):  # what the step counts must not make it compile again
        found = trained(compiled, drop)
    assert counters["stats"]["unique_graphs"] == 9  # the stem, and of each stage its first block and all others
    assert not counters["graph_break"]
    again = trained(plain, drop)
    assert not torch.equal(again["blocks.s1.0.norm_in.running_mean"], expected["blocks.s1.0.norm_in.running_mean"])
    for tensor, value in again.items():
        assert torch.allclose(found[tensor], value, rtol=1e-4, atol=1e-5), tensor
    assert list(compiled.state_dict()) == list(plain.state_dict())
    pictures = torch.randn(8, 3, 64, 64)
    with torch.no_grad(), kept_biases(compiled):
        assert torch.allclose(compiled.eval()(pictures), plain.eval()(pictures), rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]
    assert (len(compiled.flat), sum(1 for name, _ in compiled.flat if name.startswith("blocks.s3"))) == (21, 6)


def test_pyramid_has_one_map_a_stride_and_ends_with_the_features() -> None:
    model = made(NANO).eval()
    pictures = torch.randn(2, 3, 64, 64)
    maps = model.forward_pyramid(pictures)
    assert model.pyramid == [(4, 16), (8, 32), (16, 64), (32, 96)]
    assert [tuple(found.shape) for found in maps] == [
        (2, width, 64 // step, 64 // step) for step, width in model.pyramid
    ]
    features = model.forward_features(pictures)
    assert torch.equal(features, maps[-1])
    head = model.flat[-1][1]
    assert torch.allclose(head(features), model(pictures), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="built for"):
        model.forward_pyramid(torch.randn(2, 3, 96, 64))
