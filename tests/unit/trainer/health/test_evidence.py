"""What is timed on a GPU waits for no other rank, under ZeRO-3 too, whose weights travel; a start imports no MLflow."""

import subprocess
import sys
import time
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Cluster, Data, Model, Norm, Parallel, Precision, Run
from models import coatnet, spec
from models.coatnet import CoAtNet
from trainer.cluster import Member
from trainer.engine import network
from trainer.engine.engine import Engine
from trainer.engine.recompute import run_block
from trainer.health.evidence import TIMED, Stopwatch, read, timed
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


class Mark:
    """An event of a device that is done at once; like torch's it tells no time that was not recorded."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = None if enable_timing else -1.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Mark") -> float:
        assert self.at is not None
        assert other.at is not None
        return (other.at - self.at) * 1000


@pytest.mark.parametrize(("kind", "least"), [(None, 1), ("selective", 1), ("full", 2)])
def test_a_pass_that_recomputation_breaks_off_is_not_timed(
    kind: Literal["selective", "full"] | None, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    model = coatnet.build(spec.get("coatnet-nano"), resolution=32, classes=CLASSES)
    coatnet.initialise(model, 0, "cpu")
    watch = Stopwatch(model, torch.device("cuda"), compiled=False)
    watch.restart()
    torch.autograd.backward(model(torch.ones(2, 3, 32, 32), None, kind and run_block(kind)).sum())
    passes = watch.take(0.0)
    assert isinstance(passes, list)
    count = len(timed(model, compiled=False))
    assert count * least - len(model.flat) <= len(passes) <= 2 * count  # the last map of a block is not made again
    assert len(passes) >= count
    assert read(passes) > 0


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
