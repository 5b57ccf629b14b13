"""Average precision over ranks: exact, and never with the whole score matrix on one rank."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 64  # classes gathered at a time


def average_precision(scores_N: Tensor, positive_N: Tensor) -> float:
    """Area under the precision-recall steps of one class; equal scores count as one threshold.

    AP = sum over thresholds of (recall - previous recall) * precision, so the order of the samples does not matter.

    Args:
        scores_N: float, higher is more likely.
        positive_N: bool, at least one true.
    """
    order = scores_N.argsort(descending=True)
    scores, hits = scores_N[order], positive_N[order].double()
    found = hits.cumsum(0)
    last = torch.ones_like(positive_N)  # the last sample of each threshold
    last[:-1] = scores[1:] != scores[:-1]
    at = found[last]
    precision = at / torch.arange(1, len(scores) + 1, dtype=torch.float64)[last]
    gained = torch.diff(at, prepend=at.new_zeros(1))
    return float((gained * precision).sum() / found[-1])


def average_precisions(scores_NK: Tensor, positive_NK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`average_precision` of every class. A collective call.

    Args:
        scores_NK: this rank's samples, float on the CPU; ranks may hold different numbers of samples.
        positive_NK: bool.

    Returns:
        (K,) float64, the same on every rank; NaN for a class without a positive sample.
    """
    rank, world, classes = dist.get_rank(group), dist.get_world_size(group), scores_NK.shape[1]
    rows = torch.tensor([len(scores_NK)])
    every = [torch.zeros_like(rows) for _ in range(world)]
    dist.all_gather(every, rows, group=group)
    longest = max(int(count) for count in every)
    found_K = torch.zeros(classes, dtype=torch.float64)
    for number, first in enumerate(range(0, classes, CHUNK)):
        part = slice(first, min(classes, first + CHUNK))
        scores = _gather(scores_NK[:, part].float(), longest, every, group)
        positive = _gather(positive_NK[:, part].float(), longest, every, group) > 0
        if number % world != rank:  # the chunks are shared out among the ranks
            continue
        found_K[part] = math.nan
        for column in positive.any(0).nonzero().flatten().tolist():
            found_K[first + column] = average_precision(scores[:, column], positive[:, column])
    dist.all_reduce(found_K, group=group)
    return found_K


def _gather(values_NC: Tensor, longest: int, every: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows, end to end: gathered padded to the longest, the padding cut off again."""
    padded = values_NC.new_zeros(longest, values_NC.shape[1])
    padded[: len(values_NC)] = values_NC
    parts = [torch.empty_like(padded) for _ in every]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, every, strict=True)])
