"""Stochastic depth's factors: pure, layout-independent, and of the right distribution."""

import numpy as np
import pytest
import torch

from configs.errors import InputError
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


@pytest.mark.parametrize(("rate", "group", "gone"), [(0.0, 8, 0), (0.25, 8, 2), (0.3, 8, 2), (0.5, 4, 2), (0.95, 4, 3)])
def test_an_exact_count_of_every_group_drops(rate: float, group: int, gone: int) -> None:
    factors = drop_path.scales(torch.arange(64 * group), [rate] * 3, group)
    per_group = (factors == 0).view(3, 64, group).sum(-1)
    assert (per_group == gone).all()
    assert drop_path.dropped(rate, group) == gone
    kept = factors[factors > 0]
    assert torch.equal(kept, torch.full_like(kept, group / (group - gone)))
    # Which samples drop differs from group to group and layer to layer, and every place is hit.
    if 0 < gone < group - 1:
        places = (factors == 0).view(3 * 64, group)
        assert places.any(0).all()
        assert len({tuple(row.tolist()) for row in places}) > 3


def test_groups_have_their_factors_wherever_they_are() -> None:
    seeds = torch.arange(100, 124)
    whole = drop_path.scales(seeds, [0.3] * 10, 4)
    for start in range(0, 24, 4):
        assert torch.equal(drop_path.scales(seeds[start : start + 4], [0.3] * 10, 4), whole[:, start : start + 4])


def test_refuses_parted_groups() -> None:
    with pytest.raises(ValueError, match="6 samples are not made of whole groups of 4"):
        drop_path.scales(torch.arange(6), [0.5], 4)
    drop_path.check_groups(4, [(8, 16), (24, 32)])
    drop_path.check_groups(0, [(3, 5)])
    with pytest.raises(InputError, match=r"model.drop_path_group = 4.*positions 6..12 part a group; nearest valid: 2"):
        drop_path.check_groups(4, [(0, 4), (6, 12)])
