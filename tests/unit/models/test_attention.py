"""Relative attention against its formula, written out, and its backends against each other."""

import math

import pytest
import torch

from models import coatnet, spec
from models.attention import (
    Backend,
    RelativeAttention,
    attend,
    forget_biases,
    kept_biases,
    look_up,
    relative_index,
)
from models.design import RelativeBias


def layer(backend: Backend = "explicit", grid: tuple[int, int] = (3, 4)) -> RelativeAttention:
    torch.manual_seed(0)
    attention = RelativeAttention(12, 16, 8, grid, backend).double()
    torch.nn.init.normal_(attention.table)
    return attention


def test_output_is_the_papers_formula() -> None:
    attention, x = layer(), torch.randn(2, 12, 12, dtype=torch.float64)
    q, k, v = (attention.qkv(x)[..., part * 16 : part * 16 + 16] for part in range(3))
    expected = torch.zeros(2, 12, 16, dtype=torch.float64)
    for head in range(2):
        channels = slice(head * 8, head * 8 + 8)
        for query in range(12):
            logits = []
            for key in range(12):
                down, right = query // 4 - key // 4, query % 4 - key % 4
                bias = attention.table[head, down + 2, right + 3]
                logits.append((q[:, query, channels] * k[:, key, channels]).sum(-1) / math.sqrt(8) + bias)
            weights = torch.stack(logits, -1).softmax(-1)
            expected[:, query, channels] = torch.einsum("bk,bkd->bd", weights, v[:, :, channels])
    assert torch.allclose(attention(x), attention.projection(expected), rtol=0, atol=1e-12)


def test_index_names_the_offset() -> None:
    index = relative_index(2, 3, "cpu").view(6, 6)
    assert index.dtype == torch.int32
    assert index.diagonal().tolist() == [1 * 5 + 2] * 6
    assert index[5, 0] == 2 * 5 + 4
    assert index[0, 5] == 0


def test_backends_agree_with_all_gradients() -> None:
    found = []
    for backend in ("explicit", "sdpa", "auto"):
        attention = layer(backend, (5, 5))
        x = torch.randn(3, 25, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = attention(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append([y, x.grad, *(weight.grad for weight in attention.parameters())])
    for explicit, *others in zip(*found, strict=True):
        assert explicit.abs().max() > 0
        for other in others:
            assert torch.allclose(explicit, other, rtol=0, atol=1e-12)


def test_every_offset_of_the_table_gets_a_gradient() -> None:
    attention = layer()
    attention(torch.randn(2, 12, 12, dtype=torch.float64)).square().sum().backward()
    assert attention.table.grad is not None
    assert (attention.table.grad != 0).all()


def test_logits_and_softmax_are_float32_under_bf16() -> None:
    # Two keys whose biases differ by 0.03, which bf16 cannot tell apart at 8: its weights would be 0.5 each.
    q, v = torch.zeros(1, 1, 2, 8).bfloat16(), torch.zeros(1, 1, 2, 8).bfloat16()
    v[:, :, 1] = 1.0
    bias = torch.tensor([8.0, 8.03]).expand(1, 2, 2)
    y = attend(q, q, v, bias, "explicit")
    assert y.dtype == torch.bfloat16
    assert float(y[0, 0, 0, 0]) == pytest.approx(1 / (1 + math.exp(-0.03)), abs=0.002)


def test_sdpa_is_near_under_bf16() -> None:
    q, k, v = torch.randn(3, 2, 4, 49, 16, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(0)
    bias = torch.randn(4, 49, 49, generator=torch.Generator().manual_seed(1))
    explicit, fused = attend(q, k, v, bias, "explicit"), attend(q, k, v, bias, "sdpa")
    assert fused.dtype == torch.bfloat16
    assert torch.allclose(explicit.float(), fused.float(), rtol=0, atol=0.03)
    assert float(explicit.float().std()) > 0.3


def test_lookups_agree_with_gradients_under_autocast_too() -> None:
    table = torch.randn(3, 5, 9, requires_grad=True)
    index, weight = relative_index(3, 5, "cpu"), torch.randn(3, 15, 15)
    found = []
    for lookup in ("index_select", "einsum"):
        with torch.autocast("cpu", torch.bfloat16):
            bias = look_up(table, index, (3, 5), lookup)
        (gradient,) = torch.autograd.grad((bias * weight).sum(), table)
        found.append((bias, gradient))
    assert found[0][0].dtype == found[1][0].dtype == torch.float32
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("form", ["pre", "post", "none"])
def test_all_backends_and_forms_are_their_formula(form: RelativeBias) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 15, 8, generator=generator, dtype=torch.float64).unbind(0)
    bias = torch.randn(4, 15, 15, generator=generator, dtype=torch.float64) if form != "none" else None
    products = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(8)
    added = 0.0 if bias is None else bias
    weights = (products + added).softmax(-1) if form == "pre" else products.softmax(-1) + added
    expected = torch.einsum("bhqk,bhkd->bhqd", weights, v)
    with torch.no_grad():
        for backend in ("explicit", "sdpa", "flex"):
            found = attend(q, k, v, bias, backend, form)
            tolerance = 1e-12 if backend != "flex" else 1e-5  # torch's uncompiled form computes in float32
            assert torch.allclose(found, expected, rtol=0, atol=tolerance), backend


def test_a_bias_with_padded_rows_is_the_same_bias() -> None:
    q, k, v = torch.randn(3, 2, 4, 15, 8).unbind(0)
    bias = torch.randn(4, 15, 15)
    padded = torch.nn.functional.pad(bias, (0, 1))[..., :15]
    assert padded.stride(1) == 16
    assert torch.equal(attend(q, k, v, bias, "sdpa"), attend(q, k, v, padded, "sdpa"))


def test_flex_does_not_pretend_to_train_on_a_cpu() -> None:
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="flex trains on CUDA only"):
        attend(q, q, q, None, "flex")


def test_kept_biases_follow_every_change_of_the_weights() -> None:
    model = coatnet.build(spec.get("coatnet-nano"), resolution=64, classes=4, device="cpu")
    coatnet.initialise(model.eval(), 0, "cpu")
    attention = model.get_submodule("blocks.s3.0.attention")
    assert isinstance(attention, RelativeAttention)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), kept_biases(model):
        before = model(x)
        assert attention.bias() is attention.bias()
        assert torch.equal(model(x), before)
        attention.table.add_(1.0 * torch.randn_like(attention.table))  # seen by itself
        after = model(x)
        assert not torch.equal(after, before)
        attention.table.data.zero_()  # behind torch's back
        forget_biases(model)
        assert not torch.equal(model(x), after)
        kept = attention.bias()
        attention.table = torch.nn.Parameter(torch.randn_like(attention.table))
        assert attention.bias() is not kept
    with torch.no_grad():
        assert attention.bias() is not attention.bias()
    with kept_biases(model):
        assert attention.bias() is not attention.bias()  # with gradients nothing is kept
        model(x).sum().backward()
    assert attention.table.grad is not None
    assert attention.table.grad.abs().sum() > 0
