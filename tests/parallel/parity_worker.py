"""One rank of a numerics comparison: trains the same few steps under several engines, one after the other.

    python -m parity_worker CASES.json OUT.json     (RANK, WORLD_SIZE, MASTER_* set; the folder on PYTHONPATH)

The data are a pure function of the step, so that every layout sees the same global batches.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Cluster, Data, Model, Norm, Optim, Parallel, Precision, Run
from models import coatnet, drop_path, norm, spec
from trainer import checkpoint, cluster, ema, network
from trainer.engine import Engine
from trainer.loss import loss_function
from trainer.optim import adamw, learning_rate, parameter_groups
from trainer.plan import layout
from trainer.recompute import run_block

CLASSES, SIZE, STEPS, BATCH, GROUP = 7, 64, 20, 16, 8
# Small kernels keep the losses smooth, so that rounding stays rounding for twenty steps of AdamW.
spec.SPECS["parity"] = replace(spec.get("coatnet-nano"), name="parity", kernel_std=0.02)


def run_of(case: dict[str, Any]) -> Run:
    """The run of one case; every case has the same mathematics."""
    return replace(
        Run(recipe="parity", seed=3),
        model=Model(name="parity", resolution=SIZE, drop_path=case.get("drop_path", 0.2)),
        norm=Norm(replica_batch=GROUP, momentum=0.1),
        data=Data(global_batch=BATCH),
        optim=Optim(lr=1e-3, schedule="constant", warmup_steps=0, epochs=1, steps=STEPS, clip_norm=1.0, ema=0.9),
        parallel=Parallel(
            zero=case["zero"], micro_batch=case.get("micro_batch", 0), recompute=case.get("recompute", "none")
        ),
        precision=Precision(dtype=case.get("dtype", "fp32")),
        cluster=Cluster(device="cpu", timeout=120),
    )


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (BATCH, 3, SIZE, SIZE), one-hot labels and drop seeds of a step: coloured stripes, one width a class."""
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    axis = torch.arange(SIZE, dtype=torch.float32)
    waves = torch.sin(axis[None, :] * (labels[:, None] + 1) * 0.2)
    images = waves[:, None, None, :] + 0.3 * torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    seeds = torch.arange(step * BATCH, (step + 1) * BATCH, dtype=torch.int64)
    return images, nn.functional.one_hot(labels, CLASSES).float(), seeds


def plain(case: dict[str, Any]) -> dict[str, Any]:
    """One process, torch alone: the whole batch in one pass, its BatchNorm groups side by side."""
    run = run_of(case)
    model = network.bare(run, CLASSES, torch.device("cpu"))
    norm.configure(model, group=GROUP)
    groups = parameter_groups(model.named_parameters(), run.optim.weight_decay)
    optimizer = adamw(groups, run.optim, torch.device("cpu"))
    losses, norms = [], []
    averages = {name: value.detach().clone() for name, value in state(model).items()}
    for step in range(STEPS):
        images, wanted, seeds = global_batch(step)
        optimizer.zero_grad()
        drop = drop_path.scales(seeds, model.drop_rates) if run.model.drop_path else None
        logits = model(images.contiguous(memory_format=torch.channels_last), drop)
        loss = loss_function("softmax")(logits, wanted)
        torch.autograd.backward(loss)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_norm)))
        if step == case.get("poisoned_at"):  # what a poisoned step must come to: nothing
            norm.commit(model, healthy=torch.tensor(False))
        else:
            optimizer.step()
            norm.commit(model)
        kept = min(0.9, (2 + step) / (11 + step))
        for name, value in state(model).items():
            averages[name] = kept * averages[name] + (1 - kept) * value.detach()
        losses.append(loss.item())
    buffers = {name: value.tolist() for name, value in model.named_buffers() if "running" in name}
    parameters = {name: value.detach().double().sum().item() for name, value in model.named_parameters()}
    raw = evaluated(model.eval())
    with torch.no_grad():
        for name, value in state(model).items():
            value.copy_(averages[name])
    return {
        "losses": losses,
        "norms": norms,
        "buffers": buffers,
        "parameters": parameters,
        "raw": raw,
        "averaged": evaluated(model),
        "average": {name: mark(averages[name], 0) for name in parameters},
        "average_buffers": {name: averages[name].tolist() for name in buffers},
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics by name."""
    return dict(model.named_parameters()) | ema.running_statistics(model)


def mark(values: Tensor, offset: int) -> float:
    """A sum in which every element has a weight of its own; pieces of a tensor add up to the whole's."""
    flat = values.detach().double().view(-1)
    return float((flat * torch.cos(torch.arange(offset, offset + len(flat), dtype=torch.float64))).sum())


def evaluated(forward: Any) -> list[list[float]]:
    """Logits of a fixed batch."""
    with torch.no_grad():
        logits: Tensor = forward(global_batch(-1)[0])
    return logits.tolist()


def under_engine(case: dict[str, Any], member: cluster.Member) -> dict[str, Any]:
    """The same steps under the engine; checkpointed and restored into a new engine in the middle if asked."""
    run = run_of(case)
    plan = layout(run, member.world)
    engine = Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
    losses, norms = [], []
    for step in range(STEPS):
        if step == case.get("restart_at", -1):
            engine = restarted(engine, run, step, Path(case["folder"]), member)
        total = torch.zeros(())
        images, wanted, seeds = global_batch(step)
        if step == case.get("poisoned_at"):
            images[-1, 0, 5, 5] = torch.inf  # of the last rank alone
        for low, high in plan.slices(member.rank):
            model = engine.model
            assert isinstance(model, coatnet.CoAtNet)
            drop = drop_path.scales(seeds[low:high], model.drop_rates) if run.model.drop_path else None
            inputs = images[low:high].contiguous(memory_format=torch.channels_last)
            total += engine.forward_backward(
                inputs, wanted[low:high], loss_function("softmax"), drop_SB=drop, run=run_block(run.parallel.recompute)
            )
        grad_norm = engine.update(learning_rate(run.optim, step, STEPS, 0))
        norms.append(float(grad_norm))
        norm.commit(engine.model, healthy=torch.isfinite(grad_norm))
        assert engine.average is not None
        engine.average.update(step + 1)
        total /= plan.accumulation
        dist.all_reduce(total)
        losses.append(total.item() / member.world)
    buffers = {name: value.tolist() for name, value in engine.model.named_buffers() if "running" in name}
    sums = {part.name: part.value.double().sum().item() for part in engine.fragments(owned=True)}
    average = {part.name: mark(part.moments["ema"], part.offset) for part in engine.fragments(owned=True)}
    assert engine.average is not None
    with engine.evaluation() as forward:
        raw = evaluated(forward)
        with engine.averaged():
            averaged = evaluated(forward)
        assert evaluated(forward) == raw, "the raw weights did not come back"
    held = sum(part.value.numel() for part in engine.fragments(owned=True))
    return {
        "losses": losses,
        "norms": norms,
        "buffers": buffers,
        "parameters": sums,
        "raw": raw,
        "averaged": averaged,
        "average": average,
        "average_buffers": {name: value.tolist() for name, value in engine.average.buffers.items()},
        "held": held,
    }


def restarted(engine: Engine, run: Run, step: int, folder: Path, member: cluster.Member) -> Engine:
    """Save, throw the engine away, build another from other weights, restore."""
    checkpoint.save(
        folder, step, {"step": step, "updates": engine.updates}, engine.fragments(owned=True), engine.buffers(), member
    )
    saved = checkpoint.newest(folder, member)
    assert saved is not None
    other = replace(run, seed=99)
    plan = layout(run, member.world)
    fresh = Engine(network.in_layout(other, CLASSES, plan, member), run, plan, member)
    checkpoint.restore(saved, fresh.fragments(owned=False), fresh.buffers())
    fresh.restored(saved.state["updates"])
    return fresh


def main(cases_file: str, out_file: str) -> None:
    """Run every case and let each rank write what it saw."""
    np.seterr(all="raise", under="ignore")
    cases = json.loads(Path(cases_file).read_text())
    member = cluster.join(run_of({"zero": 0}))
    answers = {}
    for name, case in cases.items():
        answers[name] = plain(case) if case.get("plain") else under_engine(case, member)
    Path(f"{out_file}.{member.rank}").write_text(json.dumps(answers))
    cluster.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
