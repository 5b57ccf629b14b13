"""Stochastic depth as a pure function of samples: which are dropped does not depend on ranks, passes or stages.

S: sub-layers of the network, B: samples.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import InputError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's step


def rates(blocks: int, rate: float) -> tuple[float, ...]:
    """The drop rate of each of `blocks` blocks: rate * b / blocks for b = 0, 1, ... (COATNET.md section 2)."""
    return tuple(rate * index / blocks for index in range(blocks))


def dropped(rate: float, group: int) -> int:
    """How many of `group` samples a sub-layer drops where the count is exact: the nearest to the rate, never all."""
    return min(group - 1, round(rate * group))


def check_groups(group: int, slices: Sequence[tuple[int, int]]) -> None:
    """Refuse micro-batches that would part the groups of an exact count.

    Args:
        group: model.drop_path_group.
        slices: positions [start, stop) of one rank's micro-batches in the global batch.

    Raises:
        InputError: naming the field and a group that fits.
    """
    if not group:
        return
    for start, stop in slices:
        if start % group or stop % group:
            nearest = math.gcd(group, *(place for pair in slices for place in pair))
            raise InputError(
                f"model.drop_path_group = {group}: must divide the micro-batches, positions {start}..{stop} part a "
                f"group; nearest valid: {nearest if nearest > 1 else 0}"
            )


def scales(seeds_B: Tensor | NDArray[np.int64], rates_S: Sequence[float], group: int = 0) -> Tensor:
    """The factor on every residual branch of every sample: 0 where dropped, 1 / (1 - rate) where kept.

    Args:
        seeds_B: one int64 seed per sample, on the CPU.
        rates_S: drop rate of each sub-layer of the whole network, in order, in [0, 1). A stage of a pipeline takes
            its rows from the whole result, so that they do not depend on where the network is cut.
        group: 0: each sample drops by itself. Otherwise of every `group` consecutive samples exactly
            `dropped(rate, group)` do, and the kept ones are divided by the share that is kept.

    Returns:
        (S, B) float32 on the CPU; exactly 1 where the rate is 0.

    Raises:
        ValueError: a rate outside [0, 1), seeds that are not int64, or a batch that is not made of whole groups.
    """
    seeds = np.asarray(seeds_B)
    if seeds.dtype != np.int64:
        raise ValueError(f"stochastic depth: seeds are {seeds.dtype}, must be int64")
    rate_S1 = np.asarray(rates_S, dtype=np.float64).reshape(-1, 1)
    if ((rate_S1 < 0) | (rate_S1 >= 1)).any():
        raise ValueError(f"stochastic depth: rates must be in [0, 1), found {list(rates_S)}")
    layers_S1 = np.arange(1, len(rate_S1) + 1, dtype=np.uint64).reshape(-1, 1)
    bits_SB = _mix(_mix(seeds.astype(np.uint64) + _GOLDEN) + layers_S1 * _GOLDEN)
    if group:
        return _exact(bits_SB, rate_S1, group)
    uniform_SB = (bits_SB >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(np.where(uniform_SB < rate_S1, 0.0, 1.0 / (1.0 - rate_S1)).astype(np.float32))


def _exact(bits_SB: NDArray[np.uint64], rate_S1: NDArray[np.float64], group: int) -> Tensor:
    """Of every `group` samples those with the lowest bits drop, in the number of the rate."""
    if bits_SB.shape[1] % group:
        raise ValueError(f"stochastic depth: {bits_SB.shape[1]} samples are not made of whole groups of {group}")
    rank_SGN = bits_SB.reshape(len(bits_SB), -1, group).argsort(-1, kind="stable").argsort(-1, kind="stable")
    count_S11 = np.array([dropped(float(rate), group) for rate in rate_S1[:, 0]]).reshape(-1, 1, 1)
    factors = np.where(rank_SGN < count_S11, 0.0, group / (group - count_S11))
    return torch.from_numpy(factors.reshape(bits_SB.shape).astype(np.float32))


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser: every input bit reaches every output bit (Steele, Lea, Flood, OOPSLA 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
