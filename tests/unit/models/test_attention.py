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


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_softmax_is_float32_under_bf16(backend: Backend) -> None:
    # 256 equal keys: a bf16 softmax sums to 1 only to 3 digits and its bias of 0.001 is lost.
    q, v = torch.zeros(1, 1, 256, 8).bfloat16(), torch.ones(1, 1, 256, 8).bfloat16()
    bias = torch.zeros(1, 256, 256)
    bias[..., :128] = 3.0
    bias[..., 0] = 3.001
    v[..., 1:128, :] = 0.0
    y = attend(q, q, v, bias, backend)
    weights = bias[0, 0].double().softmax(-1)
    assert y.dtype == torch.bfloat16
    assert float(y[0, 0, 0, 0]) == pytest.approx(float(weights[0] + weights[128:].sum()), rel=2**-8)
