"""What is timed on a GPU waits for no other rank, under ZeRO-3 too, whose weights travel; a start imports no MLflow."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Cluster, Data, Model, Norm, Parallel, Precision, Run
from models import coatnet, spec
from models.coatnet import CoAtNet
from trainer.cluster import Member
from trainer.engine import network
from trainer.engine.engine import Engine
from trainer.health.evidence import TIMED, timed
from trainer.plan import layout

CLASSES = 5
RUN = replace(
    Run(),
    model=Model(name="coatnet-nano", resolution=32),
    norm=Norm(replica_batch=2),
    data=Data(synthetic=True, synthetic_classes=CLASSES, global_batch=4, workers=0),
    parallel=Parallel(zero=3, recompute="none"),
    precision=Precision(dtype="fp32"),
    cluster=Cluster(device="cpu"),
)


def weights(module: nn.Module) -> Tensor:
    """Of a convolution or a linear map."""
    assert isinstance(module, nn.Conv2d | nn.Linear)
    return module.weight


def test_weights_are_there_when_what_is_timed_begins(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    plan = layout(RUN, 1)
    engine = Engine(network.in_layout(RUN, CLASSES, plan, member), RUN, plan, member)
    assert isinstance(engine.model, CoAtNet)
    found = timed(engine.model, compiled=False)
    begun: list[tuple[nn.Module, int]] = []
    for module in found:
        module.register_forward_pre_hook(lambda module, _: begun.append((module, weights(module).numel())))
    elsewhere = [module for module in found if weights(module).numel() == 0]
    assert len(elsewhere) > TIMED // 2  # the large ones, which only come when they are needed
    with engine.evaluation() as forward:
        forward(torch.zeros(2, 3, 32, 32))
    assert {module for module, _ in begun} == set(found)
    assert all(size > 0 for _, size in begun)


def test_deepspeed_comes_without_mlflow() -> None:
    code = "import importlib.util, sys\nfrom trainer.engine import deepspeed_shims\n"
    code += "assert deepspeed_shims.imported().__version__\nassert 'mlflow' not in sys.modules\n"
    code += "assert importlib.util.find_spec('mlflow') is not None\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_largest_are_timed_and_of_a_compiled_network_the_whole() -> None:
    model = coatnet.build(spec.of(RUN.model), resolution=32, classes=CLASSES)
    found = timed(model, compiled=False)
    assert len(found) == TIMED
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in found]
    assert min(weights(m).numel() for m in found) >= max(weights(m).numel() for m in others)
    assert timed(model, compiled=True) == [model]
