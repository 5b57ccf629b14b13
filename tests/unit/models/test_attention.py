"""Relative attention against its formula, written out, and its backends against each other."""

import math

import pytest
import torch

from models.attention import Backend, RelativeAttention, attend, relative_index


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
