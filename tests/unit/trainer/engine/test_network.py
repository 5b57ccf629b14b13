"""The network of a run: where its classifier starts, and the part of it that a stage of a pipeline holds."""

from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.distributed as dist

from configs import resolve
from data_pipeline.synthetic import synthetic_dataset
from models.blocks import Head
from models.norm import BatchNorm
from trainer import cluster
from trainer.engine import network
from trainer.engine.loss import sigmoid_loss
from trainer.plan import layout
from trainer.stages import partition


def test_sigmoid_starts_at_the_classes_own_log_odds() -> None:
    plain = resolve.load("demo-digits")
    run = replace(plain, optim=replace(plain.optim, loss="sigmoid"))
    dataset = replace(synthetic_dataset(3), label_counts=(640_000, 12_800, 0))
    bias = network.head_bias(run, dataset)
    assert isinstance(bias, torch.Tensor)
    assert bias.sigmoid().tolist() == pytest.approx([0.5, 0.01, 0.5 / 1_280_000], rel=1e-4)
    model = network.bare(run, 3, torch.device("cpu"), bias)
    head = model.flat[-1][1]
    assert isinstance(head, Head)
    assert torch.equal(head.classifier.bias.data, bias)
    # With these shares the first loss is near the entropy of the labels, not near 3 ln 2.
    model.eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 64, 64))
    start = sigmoid_loss(logits, torch.tensor([[0.5, 0.01, 0.0]]))
    assert float(start) < 1.2


@pytest.mark.parametrize("stages", [2, 3, 9])
def test_the_stages_together_are_the_whole_network_to_the_bit(stages: int) -> None:
    plain = resolve.load("demo-digits")
    run = replace(
        plain, parallel=replace(plain.parallel, pipeline=stages, zero=1, micro_batch=32, balance="parameters")
    )
    device, bias = torch.device("cpu"), torch.linspace(-3, 3, 5)
    whole = network.bare(run, 5, device, bias)
    plan, found = layout(run, stages), dict[str, torch.Tensor]()
    control = cast(dist.ProcessGroup, None)  # a team of one rank asks for no group
    for stage, part in enumerate(partition.stages(run, 5, 32)):
        member = cluster.Member(stage, stages, 0, device, control, stages)
        model = network.in_layout(run, 5, plan, member, bias)
        assert tuple(name for name, _ in model.flat) == part.blocks
        assert sum(parameter.numel() for parameter in model.parameters()) == part.parameters
        assert all(layer.group == 32 for layer in model.modules() if isinstance(layer, BatchNorm))
        found |= model.state_dict()
    assert list(found) == list(whole.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.state_dict().items())


def test_softmax_starts_at_zero() -> None:
    assert network.head_bias(resolve.load("demo-digits"), synthetic_dataset(3)) == 0.0
