"""Scores on the held-out split, each sample counted once whatever the number of ranks."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Run
from data_pipeline import augment
from data_pipeline.stream import Batch
from trainer.cluster import Member
from trainer.loss import loss_function


def evaluate(forward: Callable[[Tensor], Tensor], batches: Iterable[Batch], run: Run, classes: int,
             member: Member) -> dict[str, float]:  # fmt: skip
    """Score a model.

    Args:
        forward: images (B, 3, H, W) to logits (B, classes), in evaluation mode.
        batches: this rank's share, the same number on every rank; samples with `valid` false only fill up.

    Returns:
        eval/top1 and eval/top5 (with several labels to a picture: whether one of them is there; top-1 is then the
        paper's precision@1), eval/loss and eval/samples, over all ranks.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # samples, top-1 hits, top-5 hits, loss
    loss_of = loss_function(run.optim.loss)
    for cpu_batch in batches:
        batch = cpu_batch.to(member.device)
        images = augment.prepare(batch, run.augment, torch.float32, run.precision.channels_last)
        logits = forward(images).float()
        wanted = augment.targets(batch, classes, 0.0, run.optim.loss)
        ranked = logits.topk(min(5, classes), dim=-1).indices
        hits = wanted.gather(1, ranked) > 0
        valid = batch.valid_B
        count = int(valid.sum())
        sums[0] += count
        if count:
            sums[1] += hits[valid, 0].sum().cpu()
            sums[2] += hits[valid].any(dim=1).sum().cpu()
            sums[3] += loss_of(logits[valid], wanted[valid]).double().cpu() * count
    dist.all_reduce(sums, group=member.control)
    samples, top1, top5, loss = sums.tolist()
    return {
        "eval/top1": top1 / samples,
        "eval/top5": top5 / samples,
        "eval/loss": loss / samples,
        "eval/samples": samples,
    }
