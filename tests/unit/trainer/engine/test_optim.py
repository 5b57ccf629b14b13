"""Schedules and parameter groups of the paper's table 10."""

import itertools

import pytest
import torch

from configs.schema import Optim
from models import coatnet, spec
from trainer.engine.optim import adamw, learning_rate, parameter_groups


def test_warmup_then_cosine_reaches_both_ends() -> None:
    optim = Optim(lr=1e-3, min_lr=1e-5, schedule="cosine")
    rates = [learning_rate(optim, step, 1000, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[99] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(1e-3)
    assert rates[999] == pytest.approx(1e-5)
    assert rates[100 + 449] == pytest.approx((1e-3 + 1e-5) / 2, rel=5e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[99:]))


def test_linear_falls_by_equal_amounts() -> None:
    optim = Optim(lr=1e-3, min_lr=0.0, schedule="linear")
    rates = [learning_rate(optim, step, 11, 0) for step in range(11)]
    assert rates == pytest.approx([1e-3 * (10 - step) / 10 for step in range(11)])


def test_constant_stays() -> None:
    assert learning_rate(Optim(schedule="constant"), 900, 1000, 10) == 1e-3


def test_groups_exclude_biases_norms_and_tables() -> None:
    model = coatnet.build(spec.get("coatnet0"), resolution=224, classes=10)
    decay, no_decay = parameter_groups(model.named_parameters(), 0.05)
    assert decay["weight_decay"] == 0.05
    assert no_decay["weight_decay"] == 0.0
    assert len(decay["names"]) + len(no_decay["names"]) == len(list(model.named_parameters()))
    assert all(name.endswith("weight") for name in decay["names"])
    tables = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    assert len(tables) == 7  # one table per Transformer block: 5 + 2
    for name in (*tables, *(name for name, _ in model.named_parameters() if name.endswith("bias"))):
        assert name in no_decay["names"]
    modules = dict(model.named_modules())
    for name in no_decay["names"]:
        owner = modules[name.rpartition(".")[0]]
        if name.endswith(".weight"):
            assert not isinstance(owner, torch.nn.Linear | torch.nn.Conv2d), name


def test_adamw_takes_the_recipe() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = adamw(parameter_groups([("w.weight", weight)], 0.1), Optim(betas=(0.8, 0.9)), torch.device("cpu"))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
