"""The network that a run asks for, on this rank's device."""

import torch

from configs.schema import Run
from models import coatnet, norm, spec
from trainer import cluster
from trainer.plan import Layout


def bare(run: Run, classes: int, device: torch.device) -> coatnet.CoAtNet:
    """The network with its initial weights; they depend on the seed and the parameters' names alone."""
    model = coatnet.build(
        spec.get(run.model.name),
        resolution=run.model.resolution,
        classes=classes,
        stride=run.model.stride,
        drop_path=run.model.drop_path,
        norm_momentum=run.norm.momentum,
        attention=run.model.attention,
    )
    coatnet.initialise(model, run.seed, device)
    return model


def in_layout(run: Run, classes: int, plan: Layout, member: cluster.Member) -> coatnet.CoAtNet:
    """The network for training: BatchNorm knows its groups, which may span a team of ranks. A collective call."""
    model = bare(run, classes, member.device)
    team = cluster.team_group(member, plan.team)
    norm.configure(model, group=min(plan.micro_batch, plan.replica_batch), process_group=team)
    return model
