"""What each stage of a pipeline gets of a micro-batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Augment, Cluster, Data, Model, Norm, Optim, Parallel, Run
from data_pipeline.order import Order
from data_pipeline.stream import Batch, open_data, train_loader
from models import coatnet, drop_path, spec
from models.coatnet import CoAtNet
from trainer.cluster import Member
from trainer.engine.engine import Engine
from trainer.session import part_of
from trainer.stages.pipeline import Micro
from trainer.step import Micros

CLASSES, STAGES = 5, 3
RUN = replace(
    Run(seed=3),
    model=Model(name="coatnet-nano", resolution=32, drop_path=0.5),
    norm=Norm(replica_batch=2),
    data=Data(synthetic=True, synthetic_classes=CLASSES, global_batch=8, workers=0),
    augment=Augment(crop="resize", mixup_alpha=0.4, cutmix_alpha=1.0),
    optim=Optim(label_smoothing=0.1),
    parallel=Parallel(micro_batch=4, pipeline=STAGES),
    cluster=Cluster(device="cpu"),
)


@dataclass
class Place:
    """The two things that `Micros` wants to know of an engine."""

    model: CoAtNet
    member: Member


def micros(stage: int, stages: int, run: Run = RUN) -> list[Micro]:
    """The micro-batches of two steps on one stage, from the data set as that stage reads it."""
    control = cast(dist.ProcessGroup, None)
    member = Member(stage, stages, 0, torch.device("cpu"), control, stages)
    model = coatnet.build(spec.of(run.model), resolution=32, classes=CLASSES, drop_path=run.model.drop_path)
    if stages > 1:
        model.cut(stage * 3, stage * 3 + 3)
    dataset = open_data(run)
    order = Order(dataset.split("train").counts, run.seed, 8, run.data.lanes, run.data.piece)
    batches: Iterator[Batch] = train_loader(dataset, run, order, [(0, 4), (4, 8)], 0, 2, part_of(member))
    source = Micros(cast(Engine, Place(model, member)), batches, run, CLASSES)
    found = [next(source) for _ in range(4)]
    assert source.waited > 0
    return found


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def test_each_stage_gets_its_part_of_the_same_micro_batches() -> None:
    whole = micros(0, 1)
    assert all(None not in micro for micro in whole)
    begins, inside, ends = (micros(stage, STAGES) for stage in range(STAGES))
    for micro, first, middle, last in zip(whole, begins, inside, ends, strict=True):
        assert equal(first.images, micro.images)
        assert equal(last.targets, micro.targets)
        assert all(equal(part.drop_SB, micro.drop_SB) for part in (first, middle, last))
        assert (first.targets, middle.images, middle.targets, last.images) == (None,) * 4
    images = whole[0].images
    assert images is not None
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_factors_are_those_of_the_samples_and_the_whole_network() -> None:
    (micro, *_) = micros(1, STAGES)
    model = coatnet.build(spec.of(RUN.model), resolution=32, classes=CLASSES, drop_path=0.5)
    dataset = open_data(RUN)
    order = Order(dataset.split("train").counts, RUN.seed, 8, RUN.data.lanes, RUN.data.piece)
    batch = next(train_loader(dataset, RUN, order, [(0, 4)], 0, 1, "seeds"))
    assert equal(micro.drop_SB, drop_path.scales(batch.seeds_B, model.drop_rates))
    assert micro.drop_SB is not None
    assert micro.drop_SB.shape == (len(model.drop_rates), 4)
    assert 0 < int((micro.drop_SB == 0).sum()) < micro.drop_SB.numel()


@pytest.mark.parametrize("stage", range(STAGES))
def test_without_stochastic_depth_there_are_no_factors(stage: int) -> None:
    run = replace(RUN, model=replace(RUN.model, drop_path=0.0))
    assert [micro.drop_SB for micro in micros(stage, STAGES, run)] == [None] * 4
