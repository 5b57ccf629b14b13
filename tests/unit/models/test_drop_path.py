"""Stochastic depth's factors: pure, layout-independent, and of the right distribution."""

import numpy as np
import pytest
import torch

from models import drop_path


def test_values_are_zero_or_the_inverse_of_keep() -> None:
    factors = drop_path.scales(torch.arange(1000), (0.0, 0.25, 0.5))
    assert factors.dtype == torch.float32
    assert factors.shape == (3, 1000)
    assert torch.equal(factors[0], torch.ones(1000))
    assert set(factors[1].tolist()) == {0.0, float(np.float32(1 / 0.75))}
    assert set(factors[2].tolist()) == {0.0, 2.0}


def test_a_sample_has_its_factors_wherever_it_is() -> None:
    seeds = torch.tensor([5, -3, 2**62, 7, -(2**63)])
    whole = drop_path.scales(seeds, [0.3] * 40)
    for position in range(5):
        assert torch.equal(drop_path.scales(seeds[position : position + 1], [0.3] * 40)[:, 0], whole[:, position])
    assert torch.equal(drop_path.scales(seeds.numpy(), [0.3] * 20), whole[:20])
    assert len({tuple(column.tolist()) for column in whole.T}) == 5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_of_dropped_is_the_rate_and_layers_and_samples_are_independent(rate: float) -> None:
    samples = 40_000
    kept = (drop_path.scales(torch.arange(samples), [rate] * 6) > 0).double()
    spread = (rate * (1 - rate) / samples) ** 0.5
    assert ((kept.mean(1) - (1 - rate)).abs() < 4.5 * spread).all()
    correlation = torch.corrcoef(torch.cat([kept, kept.roll(1, dims=1)]))
    assert (correlation - torch.eye(12)).abs().max() < 4.5 / samples**0.5


def test_rates_grow_linearly_from_zero() -> None:
    assert drop_path.rates(4, 0.2) == pytest.approx((0.0, 0.05, 0.1, 0.15))


def test_refuses_rates_and_seeds_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        drop_path.scales(torch.arange(2), [1.0])
    with pytest.raises(ValueError, match="int64"):
        drop_path.scales(torch.arange(2).float(), [0.5])
