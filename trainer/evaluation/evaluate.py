"""Scores on the held-out split, each sample counted once whatever the number of ranks."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Run
from data_pipeline import augment
from data_pipeline.manifest import Dataset
from data_pipeline.stream import Batch
from trainer.cluster import Member
from trainer.engine.loss import loss_function
from trainer.evaluation.average_precision import average_precisions
from trainer.evaluation.examples import Examples


def evaluate(
    forward: Callable[[Tensor], Tensor | None],
    batches: Iterable[Batch],
    run: Run,
    dataset: Dataset,
    member: Member,
    examples: Examples | None = None,
) -> dict[str, float]:
    """Score a model.

    Args:
        forward: images (B, 3, H, W) to logits (B, classes), in evaluation mode; None on the stages of a pipeline that
            have none.
        batches: this replica's share, the same number on every rank; samples with `valid` false only fill up.
        examples: looks at every batch too, on every rank.

    Returns:
        top1 and top5 (with several labels to a picture: whether one of them is there; top-1 is then the paper's
        precision@1), loss, samples, and with several labels map, the mean average precision; over all ranks.
    """
    classes, several = dataset.classes, dataset.label_kind == "multi"
    kept: list[tuple[Tensor, Tensor]] = []  # scores and labels, for the mean average precision
    sums = torch.zeros(4, dtype=torch.float64)  # samples, top-1 hits, top-5 hits, loss
    loss_of = loss_function(run.optim.loss)
    for cpu_batch in batches:
        batch = cpu_batch.to(member.device)
        images = batch.images_BCHW
        if member.begins:
            images = augment.prepare(batch, run.augment, torch.float32, run.precision.channels_last)
        output = forward(images)
        if output is None:
            continue
        logits = output.float()
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
        if several:
            kept.append((logits[valid].cpu(), wanted[valid].cpu() > 0))
        if examples is not None:
            examples.take(cpu_batch, logits, wanted)
    dist.all_reduce(sums, group=member.control)
    samples, top1, top5, loss = sums.tolist()
    scores = {"top1": top1 / samples, "top5": top5 / samples, "loss": loss / samples, "samples": samples}
    if several:
        nothing = torch.empty(0, classes)
        pairs = [torch.cat(parts) for parts in zip(*kept, strict=True)] or [nothing, nothing > 0]
        precisions = average_precisions(pairs[0], pairs[1], member.control)
        scores["map"] = float(precisions.nanmean())
        if examples is not None:
            examples.precisions = precisions
    return scores


def describe(scores: dict[str, float]) -> str:
    """Scores for a person, a line for the raw weights and one for the averaged ones."""
    lines = []
    for prefix, weights in (("eval", "raw weights"), ("eval_ema", "averaged weights")):
        if f"{prefix}/top1" in scores:
            ranked = f", mAP {scores[f'{prefix}/map']:.2%}" if f"{prefix}/map" in scores else ""
            lines.append(
                f"held-out top-1 {scores[f'{prefix}/top1']:.2%}, top-5 {scores[f'{prefix}/top5']:.2%}{ranked} on "
                f"{scores[f'{prefix}/samples']:,.0f} images ({weights})"
            )
    return "\n".join(lines)
