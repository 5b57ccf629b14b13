"""Compiled blocks under the ZeRO stages that allow them take the same steps."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from configs.schema import Cluster, Data, Model, Norm, Optim, Parallel, Precision, Run
from models import coatnet, norm
from trainer.cluster import Member
from trainer.engine import network
from trainer.engine.engine import Engine
from trainer.engine.loss import loss_function
from trainer.plan import layout
from trainer.stages.pipeline import Micro

CLASSES, SIZE, BATCH = 5, 32, 8
RUN = replace(
    Run(recipe="compiled", seed=2),
    model=Model(name="coatnet-nano", resolution=SIZE, depths=(2, 1, 1, 1, 1)),
    norm=Norm(replica_batch=4),
    data=Data(global_batch=BATCH),
    optim=Optim(lr=1e-3, schedule="constant", warmup_steps=0, steps=10),
    precision=Precision(dtype="fp32"),
    cluster=Cluster(device="cpu"),
)


def losses(member: Member, **parallel: Any) -> list[float]:
    """Of three steps."""
    run = replace(RUN, parallel=Parallel(micro_batch=4, **parallel))
    plan = layout(run, 1)
    engine = Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=draw).contiguous(memory_format=torch.channels_last)
    wanted = torch.nn.functional.one_hot(torch.arange(BATCH) % CLASSES, CLASSES).float()

    def micros() -> Iterator[Micro]:
        return (Micro(images[low:high], wanted[low:high], None) for low, high in plan.slices(0))

    found = []
    for _ in range(3):
        found.append(engine.forward_backward(micros(), loss_function("softmax")).item())
        engine.update(1e-3)
        norm.commit(engine.model)
    return found


@pytest.mark.parametrize(("zero", "recompute"), [(0, "none"), (1, "none"), (2, "full")])
def test_compiled_blocks_take_the_same_steps(
    zero: int, recompute: str, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor would start a compiler for every block.
    compiled = mock.Mock(side_effect=partial(coatnet.compile_blocks, backend="aot_eager"))
    monkeypatch.setattr(coatnet, "compile_blocks", compiled)
    plain = losses(member, zero=zero, recompute=recompute)
    assert compiled.call_count == 0
    assert losses(member, zero=zero, recompute=recompute, compile=True) == pytest.approx(plain, abs=1e-6)
    assert compiled.call_count == 1
    assert plain[-1] < plain[0]
