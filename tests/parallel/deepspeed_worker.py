"""One rank that trains under several engines and lets DeepSpeed save them, and the trainer beside it.

    python -m tests.parallel.deepspeed_worker OUT     (RANK, WORLD_SIZE, MASTER_* set)

OUT/NAME/theirs is DeepSpeed's checkpoint. Beside it, of a CoAtNet, is a run folder of ours; of another network what
DeepSpeed itself says its fp32 weights are.
"""

import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import resolve
from configs.schema import Model
from tests.parallel.parity_worker import CLASSES, LOSS, commit, micros, number_from_zero, run_of
from trainer import cluster
from trainer.engine import deepspeed_shims, network
from trainer.engine.engine import Engine
from trainer.plan import layout
from trainer.state import checkpoint

COATNETS = {"zero0": (1, 0), "zero1": (1, 1), "zero2": (1, 2), "zero3": (1, 3), "stages": (2, 3)}  # pipeline, ZeRO
OTHERS = {"bf16-zero1": 1, "bf16-zero3": 3}


class Other(nn.Module):
    """A network of no CoAtNet: a weight used twice, one that is not trained, sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 5, bias=False)
        self.fixed = nn.Linear(5, 3)
        self.register_buffer("scale", torch.full((5,), 1.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.unembed = nn.Linear(7, 5, bias=False)
        self.unembed.weight = self.embed.weight
        self.fixed.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 7) to (B, 3)."""
        self.get_buffer("calls").add_(1)
        y: Tensor = self.fixed((self.embed(x) + self.unembed(x)) * self.get_buffer("scale").to(x.dtype))
        return y


def coatnet(name: str, out: Path, base: cluster.Member) -> None:
    """Two steps of a CoAtNet under the trainer's engine."""
    pipeline, zero = COATNETS[name]
    run = run_of({"zero": zero, "pipeline": pipeline, "size": 32, "micro_batch": 4})
    run = replace(run, recipe="demo-digits", model=Model(name="coatnet-nano", resolution=32))
    number_from_zero()
    member = cluster.in_mesh(base, pipeline, timedelta(seconds=60))
    plan = layout(run, member.world)
    engine = Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
    for step in range(2):
        engine.forward_backward(micros(engine, run, step, False), LOSS)
        engine.update(1e-3)
        commit(engine, torch.tensor(True), "")
        assert engine.average is not None
        engine.average.update(step + 1)
    engine._engine.save_checkpoint(str(out / "theirs"))
    state = {
        "step": 2, "updates": engine.updates, "world": member.world, "config": resolve.digest(run), "versions": {},
        "run": json.loads(resolve.to_json(run)), "vocabulary": list("abcdefg"), "order": {"consumed": 32},
    }  # fmt: skip
    if member.first:
        (out / "run.json").write_text(resolve.to_json(run))
    parts, buffers = engine.fragments(owned=True), engine.buffers()
    checkpoint.save(out / "checkpoints", 2, state, parts, buffers, member)
    if member.first:
        parts[0].value[0] += 0.5
    checkpoint.save(out / "checkpoints", 3, {**state, "step": 3}, parts, buffers, member)


def other(zero: int, out: Path, base: cluster.Member) -> None:
    """A few steps of another network in bf16, by DeepSpeed alone."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    number_from_zero()
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_batch_size": 4 * base.world, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True},
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        "data_types": {"grad_accum_dtype": "fp32"}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    model = Other()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=0.1), config=config, dist_init_required=False
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        loss = engine(torch.randn(4, 7, generator=generator).bfloat16()).float().square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out / "theirs"))
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[name] = safe_get_full_fp32_param(parameter).clone()  # a collective call
    if base.first:
        save_file(found, out / "whole.safetensors")


def main(out: str) -> None:
    """Make every checkpoint."""
    member = cluster.join(run_of({"zero": 0}))
    deepspeed_shims.build_nothing()
    torch.set_num_threads(1)
    for name in (*OTHERS, *COATNETS):  # DeepSpeed remembers the stages of an engine in a global
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        if name in COATNETS:
            coatnet(name, folder, member)
        else:
            other(OTHERS[name], folder, member)
    cluster.leave()


if __name__ == "__main__":
    main(sys.argv[1])
