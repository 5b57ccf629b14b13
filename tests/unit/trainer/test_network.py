"""The network of a run: where its classifier starts."""

from dataclasses import replace

import pytest
import torch

from configs import resolve
from data_pipeline.synthetic import synthetic_dataset
from models.blocks import Head
from trainer import network
from trainer.loss import sigmoid_loss


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


def test_softmax_starts_at_zero() -> None:
    assert network.head_bias(resolve.load("demo-digits"), synthetic_dataset(3)) == 0.0
