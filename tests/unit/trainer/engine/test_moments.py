"""AdamW's moments in bf16: right on the average, the same again, and left alone where the gradient is not finite."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from configs.schema import Optim
from trainer.engine import moments
from trainer.engine.moments import LOW, HalfMoments, noise, rounded
from trainer.engine.optim import adamw

KINDS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moments.PIECES, "cpu", 100)
        yield


def parameter(size: int = 1037) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))


def made(weight: torch.nn.Parameter, kind: type[torch.optim.AdamW] = HalfMoments) -> torch.optim.AdamW:
    return kind([weight], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


def gradients(steps: int, size: int = 1037) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield torch.randn(size, generator=draw)


def places(size: int) -> Tensor:
    return torch.arange(size) * 0x9E3779B1


def test_a_value_becomes_one_of_its_neighbours_and_itself_on_the_average() -> None:
    value = torch.full((1 << 16,), 1 + 0.3 / 128)  # three tenths of the way from one number of bf16 to the next
    for shift in (0, 16):
        found = rounded(value, (noise(places(1 << 16), torch.tensor(7.0), 3) >> shift) & LOW)
        assert sorted(set(found.tolist())) == [1.0, 1 + 1 / 128]
        assert torch.equal(found, found.bfloat16().float())
        assert found.mean().item() == pytest.approx(value.mean().item(), abs=3 * 0.5 / 128 / 256)


def test_what_bf16_can_tell_stays_as_it_is() -> None:
    value = torch.randn(4096).bfloat16().float()
    assert torch.equal(rounded(value, noise(places(4096), torch.tensor(7.0), 0) & LOW), value)


def test_chance_differs_between_steps_pieces_and_moments() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    seen = [noise(places(4096), step, piece) for step in (one, two) for piece in (0, 1)]
    draws = torch.stack([part for found in seen for part in ((found & LOW).float(), (found >> 16).float())])
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / 64
    assert draws.min() >= 0
    assert draws.max() <= LOW
    assert (draws.mean(1) / LOW - 0.5).abs().max() < 5 * 0.29 / 64


def test_a_constant_second_moment_is_reached() -> None:
    """Rounded to the nearest it would stop where a step of 1/1000 is less than half the way to the next number."""
    weight = parameter(300)
    ours = HalfMoments([weight], lr=0.0, betas=(0.9, 0.999), fused=True)
    for _ in range(2000):
        weight.grad = torch.ones_like(weight)
        ours.step()
    second = ours.state[weight]["exp_avg_sq"].float()
    expected = 1 - 0.999**2000
    assert second.mean().item() == pytest.approx(expected, rel=3e-3)
    nearest = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(2000):
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    assert nearest.item() < 0.6 * expected


def test_it_follows_adamw_in_fp32() -> None:
    weight, exact = parameter(), parameter()
    ours, theirs = made(weight), made(exact, torch.optim.AdamW)
    start = exact.detach().clone()
    for gradient in gradients(40):
        weight.grad, exact.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    assert (weight - exact).norm() < 0.01 * (exact - start).norm()
    for kind in KINDS:
        state, wide = ours.state[weight][kind], theirs.state[exact][kind]
        assert state.dtype is torch.bfloat16
        assert (state.float() - wide).norm() < 0.02 * wide.norm()
    assert ours.state[weight]["step"] == 40


def test_a_run_that_continues_repeats_itself() -> None:
    through, broken = parameter(), parameter()
    ours, other = made(through), made(broken)
    for number, gradient in enumerate(gradients(6)):
        if number == 3:
            kept = {name: value.clone() for name, value in other.state[broken].items()}
            other = made(broken)
            other.state[broken] = kept
        through.grad, broken.grad = gradient.clone(), gradient.clone()
        ours.step()
        other.step()
    assert torch.equal(through, broken)
    assert all(torch.equal(ours.state[through][kind], other.state[broken][kind]) for kind in KINDS)


def test_where_the_gradient_is_not_finite_nothing_changes() -> None:
    weight = parameter()
    ours = made(weight)
    weight.grad = next(gradients(1))
    ours.step()
    before = {name: value.clone() for name, value in ours.state[weight].items()} | {"weight": weight.detach().clone()}
    weight.grad = torch.full_like(weight, torch.nan)
    ours.found_inf = torch.ones(())  # type: ignore[attr-defined]
    ours.step()
    after = ours.state[weight] | {"weight": weight.detach()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_setting_chooses_it() -> None:
    group = {"name": "decay", "names": ["w"], "params": [parameter()], "weight_decay": 0.1}
    assert type(adamw([group], Optim(), torch.device("cpu"))) is torch.optim.AdamW
    assert type(adamw([group], Optim(), torch.device("cpu"), "bf16")) is HalfMoments
