"""Mean average precision over ranks: exact, and never with the whole score matrix on one rank."""

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


def mean_average_precision(scores_NK: Tensor, positive_NK: Tensor, group: dist.ProcessGroup) -> float:
    """Mean of `average_precision` over the classes that have a positive sample. A collective call.

    Args:
        scores_NK: this rank's samples, float on the CPU; ranks may hold different numbers of samples.
        positive_NK: bool.

    Returns:
        The mean, the same on every rank; NaN if no class has a positive sample.
    """
    rank, world, classes = dist.get_rank(group), dist.get_world_size(group), scores_NK.shape[1]
    rows = torch.tensor([len(scores_NK)])
    every = [torch.zeros_like(rows) for _ in range(world)]
    dist.all_gather(every, rows, group=group)
    longest = max(int(count) for count in every)
    total = torch.zeros(2, dtype=torch.float64)  # sum of average precisions, classes in it
    for number, first in enumerate(range(0, classes, CHUNK)):
        part = slice(first, min(classes, first + CHUNK))
        scores = _gather(scores_NK[:, part].float(), longest, every, group)
        positive = _gather(positive_NK[:, part].float(), longest, every, group) > 0
        if number % world != rank:  # the chunks are shared out among the ranks
            continue
        for column in positive.any(0).nonzero().flatten().tolist():
            total[0] += average_precision(scores[:, column], positive[:, column])
            total[1] += 1
    dist.all_reduce(total, group=group)
    return float(total[0] / total[1])


def _gather(values_NC: Tensor, longest: int, every: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows, end to end: gathered padded to the longest, the padding cut off again."""
    padded = values_NC.new_zeros(longest, values_NC.shape[1])
    padded[: len(values_NC)] = values_NC
    parts = [torch.empty_like(padded) for _ in every]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, every, strict=True)])
