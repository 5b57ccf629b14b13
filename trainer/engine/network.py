"""The network that a run asks for, on this rank's device."""

import torch
from torch import Tensor

from configs.schema import Run
from data_pipeline.manifest import Dataset
from models import coatnet, norm, spec
from trainer import cluster
from trainer.engine.deepspeed_config import deepspeed_config, weights
from trainer.engine.deepspeed_shims import Cutter
from trainer.plan import Layout
from trainer.stages.partition import stages


def head_bias(run: Run, dataset: Dataset) -> Tensor | float:
    """The classifier's first bias: with the sigmoid loss the log-odds of each class in the training split, else 0.

    Otherwise the first thousand steps would only learn that most of 18,000 classes are absent. A class without a
    sample counts as half a one.
    """
    if run.optim.loss != "sigmoid":
        return 0.0
    samples = dataset.split("train").samples
    counts = dataset.label_counts or (samples / dataset.classes,) * dataset.classes
    share = torch.tensor(counts, dtype=torch.float64).clamp(0.5, samples - 0.5) / samples
    return torch.logit(share).float()


def bare(run: Run, classes: int, device: torch.device, bias: Tensor | float = 0.0) -> coatnet.CoAtNet:
    """The network with its initial weights; they depend on the seed and the parameters' names alone."""
    model = built(run, classes)
    coatnet.initialise(model, run.seed, device, bias)
    return model


def built(run: Run, classes: int) -> coatnet.CoAtNet:
    """The network on the meta device: shapes without values."""
    return coatnet.build(
        spec.of(run.model),
        resolution=run.model.resolution,
        classes=classes,
        drop_path=run.model.drop_path,
        norm_momentum=run.norm.momentum,
        attention=run.model.attention,
        bias_lookup=run.model.bias_lookup,
        drop_group=run.model.drop_path_group,
    )


def in_layout(
    run: Run, classes: int, plan: Layout, member: cluster.Member, bias: Tensor | float = 0.0
) -> coatnet.CoAtNet:
    """This rank's stage of the network for training. A collective call.

    BatchNorm knows its groups, which may span a team of ranks. Under ZeRO-3 the weights are in pieces, block by block
    as they are made, so that no rank ever holds the whole.
    """
    model = built(run, classes)
    if plan.stages > 1:
        cut = stages(run, classes, plan.micro_batch)[member.stage]
        model.cut(cut.first, cut.last)
    cutter = None
    if run.parallel.zero == 3:
        cutter = Cutter(member, deepspeed_config(run, plan, weights(run, classes, *model.part)))
    coatnet.initialise(model, run.seed, member.device, bias, cutter)
    team = cluster.team_group(member, plan.team, run.cluster.timeout)
    norm.configure(model, group=min(plan.micro_batch, plan.replica_batch), process_group=team)
    if run.parallel.compile:
        coatnet.compile_blocks(model)
    return model
