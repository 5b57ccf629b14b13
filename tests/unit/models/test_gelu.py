"""GELU by a table: torch's own numbers, whatever the values, the layout and the length."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import gelu as module
from models.gelu import gelu


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def every_value() -> Tensor:
    """(65536,) bf16: all there are, infinities and NaN among them."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def both(x: Tensor, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradient of ours and of torch's vector kernels, which want both factors in one layout."""
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    found = []
    for function in (gelu, lambda x: F.gelu(x, approximate="tanh")):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        torch.autograd.backward(y, gradient if function is gelu else gradient.contiguous(memory_format=order))
        assert leaf.grad is not None
        assert "LookedUp" in str(y.grad_fn) or function is not gelu
        found.append([y.detach(), leaf.grad])
    return found[0], found[1]


def same_bits(x: Tensor, other: Tensor) -> bool:
    return torch.equal(x.view(torch.int16), other.view(torch.int16))


def test_every_value_and_its_gradient_are_torch_s() -> None:
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(1 << 16, generator=draw).to(torch.bfloat16)
    (y, slope), (expected, gradients) = both(every_value(), gradient)
    assert same_bits(y, expected)
    assert torch.allclose(slope, gradients, rtol=0, atol=0, equal_nan=True)
    assert not y[:0x7F80].isnan().any()  # the finite numbers from zero up


@pytest.mark.parametrize("piece", [64, 100, 1 << 18])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_lengths(layout: torch.memory_format, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 32, 3, 4, generator=draw)).to(torch.bfloat16).contiguous(memory_format=layout)
    for given in (torch.contiguous_format, torch.channels_last):  # of the gradient
        gradient = torch.randn(2, 32, 3, 4, generator=draw).to(torch.bfloat16).contiguous(memory_format=given)
        (y, slope), (expected, gradients) = both(x, gradient)
        assert torch.equal(y, expected)
        assert torch.equal(slope, gradients)
        assert y.stride() == slope.stride() == x.stride()
    (y, slope), _ = both(x[:0], gradient[:0])
    assert len(y) == len(slope) == 0


def test_where_there_is_no_table_torch_s_own_is_called() -> None:
    x = torch.randn(4, 8, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    assert "LookedUp" in str(gelu(x).grad_fn)
    for other in (x.float(), x.double(), x[:, ::2], x.permute(3, 1, 0, 2), x.expand(2, 4, 8, 3, 3)):
        assert str(gelu(other).grad_fn).startswith("<GeluBackward")
        assert torch.equal(gelu(other), F.gelu(other, approximate="tanh"))
    torch.set_num_threads(2)
    assert str(gelu(x).grad_fn).startswith("<GeluBackward")


def test_it_compiles_as_a_whole() -> None:
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(gelu, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), gelu(x), rtol=1e-2, atol=1e-2)
