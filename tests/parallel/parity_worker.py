"""One rank of a numerics comparison: trains the same few steps under several engines, one after the other.

    pool.Job("parity_worker", ("CASES.json", "OUT"), ...)

The data are a pure function of the step, so that every layout sees the same global batches. A rank measures what it
holds against the file that the plain process left, element by element, and reports distances and digests.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.schema import Cluster, Data, Model, Norm, Optim, Parallel, Precision, Run
from models import coatnet, drop_path, norm, spec
from tests.parallel.parity_faults import BREAKS
from trainer import cluster
from trainer.engine import deepspeed_config, ema, network
from trainer.engine.deepspeed_config import PIECE
from trainer.engine.deepspeed_fragments import Fragment
from trainer.engine.engine import Engine
from trainer.engine.loss import loss_function
from trainer.engine.optim import adamw, learning_rate, parameter_groups
from trainer.plan import layout
from trainer.stages.pipeline import Micro
from trainer.state import checkpoint

CLASSES, SIZE, STEPS, BATCH, GROUP = 7, 64, 20, 16, 4
CLIP, EMA, DROP = 0.5, 0.9, 0.1
LOSS = loss_function("softmax")
# Rounding must stay rounding for twenty steps. Small kernels keep the network smooth. AdamW's eps is far above the
# rounding of a gradient, and near enough to the gradients that their scale matters: a wrong clip is seen in the losses.
EPS = 1e-2
# Seeds by size. fp32 is compared at 32 px: with this seed no window of a max-pool has its two largest values nearer
# than 6e-6 of their size in any step, so that no layout takes another one; with weights changed by 3e-7 of themselves
# the losses move by 6e-7. Larger pictures have four times the windows, but bf16's rounding averages out over positions.
SEEDS = {32: 86, 64: 4}
spec.SPECS["parity"] = replace(spec.get("coatnet-nano"), name="parity", kernel_std=0.05)
# The same with a last stage that has weights large enough to go to a disk, from two ranks too.
_STAGES = spec.get("parity").stages
spec.SPECS["parity-wide"] = replace(
    spec.get("parity"), name="parity-wide", stages=(*_STAGES[:-1], replace(_STAGES[-1], width=512, depth=2))
)
Arrays = dict[str, Tensor]


def run_of(case: dict[str, Any]) -> Run:
    """The run of one case; every case has the same mathematics."""
    return replace(
        Run(recipe="parity", seed=SEEDS[case.get("size", SIZE)]),
        model=Model(
            name=case.get("model", "parity"), resolution=case.get("size", SIZE), drop_path=case.get("drop", DROP)
        ),
        norm=Norm(replica_batch=GROUP, momentum=0.1),
        data=Data(global_batch=BATCH),
        optim=Optim(
            lr=1e-3,
            eps=EPS,
            schedule="constant",
            warmup_steps=0,
            epochs=1,
            steps=case.get("steps", STEPS),
            clip_norm=CLIP,
            ema=EMA,
        ),
        parallel=Parallel(
            zero=case["zero"],
            pipeline=case.get("pipeline", 1),
            micro_batch=case.get("micro_batch", 0),
            recompute=case.get("recompute", "none"),
            offload=case.get("offload", "none"),
            offload_path=case["folder"] if case.get("offload") == "nvme" else "",
            shard_group=case.get("shard_group", 0),
        ),
        precision=Precision(dtype=case.get("dtype", "fp32"), moments=case.get("moments", "fp32")),
        cluster=Cluster(device="cpu", timeout=120),
    )


def global_batch(step: int, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Images (BATCH, 3, size, size), one-hot labels and drop seeds of a step: coloured stripes, one width a class."""
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    axis = torch.arange(size, dtype=torch.float32)
    waves = torch.sin(axis[None, :] * (labels[:, None] + 1) * 0.2)
    images = waves[:, None, None, :] + 0.3 * torch.randn(BATCH, 3, size, size, generator=generator)
    seeds = torch.arange(step * BATCH, (step + 1) * BATCH, dtype=torch.int64)
    return images, nn.functional.one_hot(labels, CLASSES).float(), seeds


def plain(case: dict[str, Any]) -> dict[str, Any]:
    """One process, torch alone: the whole batch in one pass, its BatchNorm groups side by side.

    Leaves all weights, running statistics and their averages in the file `case["reference"]`.
    """
    run = run_of(case)
    model = network.bare(run, CLASSES, torch.device("cpu"))
    norm.configure(model, group=GROUP)
    if "shaken" in case:
        shake(model, case["shaken"])
    groups = parameter_groups(model.named_parameters(), run.optim.weight_decay)
    optimizer = adamw(groups, run.optim, torch.device("cpu"))
    losses, norms = [], []
    start = {name: value.detach().clone() for name, value in state(model).items()}
    averages = {name: value.clone() for name, value in start.items()}
    for step in range(run.optim.steps):
        images, wanted, seeds = global_batch(step, run.model.resolution)
        optimizer.zero_grad()
        drop = drop_path.scales(seeds, model.drop_rates) if run.model.drop_path else None
        logits = model(images.contiguous(memory_format=torch.channels_last), drop)
        loss = LOSS(logits, wanted)
        torch.autograd.backward(loss)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        if step == case.get("poisoned_at"):  # what a poisoned step must come to: nothing
            norm.commit(model, healthy=torch.tensor(False))
        else:
            optimizer.step()
            norm.commit(model)
        kept = min(EMA, (2 + step) / (11 + step))
        for name, value in state(model).items():
            averages[name] = kept * averages[name] + (1 - kept) * value.detach()
        losses.append(loss.item())
    raw = evaluated(model.eval(), run.model.resolution)
    weights = {name: value.detach().clone() for name, value in state(model).items()}
    stored = {"start": start, "weights": weights, "average": averages}
    flat = {f"{kind}/{name}": value.contiguous() for kind, found in stored.items() for name, value in found.items()}
    save_file(flat, case["reference"])
    with torch.no_grad():
        for name, value in state(model).items():
            value.copy_(averages[name])
    return {
        "losses": losses,
        "norms": norms,
        "raw": raw,
        "averaged": evaluated(model, run.model.resolution),
        "parameters": {name: value.numel() for name, value in model.named_parameters()},
        "statistics": list(ema.running_statistics(model)),
    }


def shake(model: nn.Module, seed: int) -> None:
    """Change every weight by about a rounding of fp32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))


def state(model: nn.Module) -> Arrays:
    """Parameters and running statistics by name."""
    return dict(model.named_parameters()) | ema.running_statistics(model)


def evaluated(forward: Any, size: int = SIZE) -> list[list[float]] | None:
    """Logits of a fixed batch; None on a stage of a pipeline that is not the last."""
    with torch.no_grad():
        logits: Tensor | None = forward(global_batch(-1, size)[0])
    return None if logits is None else logits.tolist()


def under_engine(case: dict[str, Any], base: cluster.Member) -> dict[str, Any]:
    """The same steps under the engine; checkpointed and restored into a new engine in the middle if asked."""
    run = run_of(case)
    fault = case.get("fault", "")
    deepspeed_config.PIECE = case.get("piece", PIECE)
    number_from_zero()
    member = cluster.in_mesh(base, run.parallel.pipeline, timedelta(seconds=run.cluster.timeout))
    plan = layout(run, member.world)
    losses: list[float] = []
    norms: list[float] = []
    noted: dict[str, Any] = {}
    with ExitStack() as stack:
        for broken in BREAKS.get(fault, ()):
            stack.enter_context(broken())
        engine = Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
        for step in range(run.optim.steps):
            if step == case.get("restart_at", -1):
                engine = restarted(engine, run, step, Path(case["folder"]), member)
            loss = engine.forward_backward(micros(engine, run, step, case.get("poisoned_at") == step), LOSS)
            grad_norm = engine.update(learning_rate(run.optim, step, run.optim.steps, 0))
            norms.append(float(grad_norm))
            commit(engine, torch.isfinite(grad_norm), fault if step == run.optim.steps // 2 else "")
            if not (fault == "average" and step == run.optim.steps // 2):
                assert engine.average is not None
                engine.average.update(step + 1)
            dist.all_reduce(loss)
            losses.append(loss.item() / member.world)
            if step + 1 == case.get("note_after"):
                noted = {"losses": losses[:], "norms": norms[:], **digests(engine)}
    return {
        "stage": member.stage,
        "losses": losses,
        "norms": norms,
        "noted": noted,
        **held(engine, case["reference"], run.model.resolution),
    }


def number_from_zero() -> None:
    """Let DeepSpeed number modules and parameters as in a process that makes one engine.

    Its numbers count on through a process, and under ZeRO-3 the replicas of a stage compare theirs: where they held
    different stages of an earlier engine these would not agree.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0


def commit(engine: Engine, healthy: Tensor, fault: str) -> None:
    """Move the running statistics; twice with the fault "statistics", on one rank by a bit more with "replica"."""
    member = engine.member
    again = {name: value.clone() for name, value in engine.model.named_buffers() if name.endswith("pending")}
    norm.commit(engine.model, member.data_group, healthy)
    if fault == "statistics":
        for name, value in again.items():
            engine.model.get_buffer(name).copy_(value)
        norm.commit(engine.model, member.data_group, healthy)
    if fault == "replica" and member.replica == 1:
        first = next(iter(ema.running_statistics(engine.model).values()))
        first.copy_(torch.nextafter(first, first + 1))


def held(engine: Engine, reference: str, size: int) -> dict[str, Any]:
    """What this rank holds at the end: distances from the reference, digests, the pieces and their sizes."""
    expected: dict[str, Arrays] = {}
    for key, value in load_file(reference).items():
        kind, _, name = key.partition("/")
        expected.setdefault(kind, {})[name] = value
    parts = list(engine.fragments(owned=True))
    assert engine.average is not None
    buffers = {"weights": ema.running_statistics(engine.model), "average": engine.average.buffers}
    with engine.evaluation() as forward:
        raw = evaluated(forward, size)
        with engine.averaged():
            averaged = evaluated(forward, size)
        assert evaluated(forward, size) == raw, "the raw weights did not come back"
    return {
        "raw": raw,
        "averaged": averaged,
        "distances": {kind: squares(parts, kind, expected) for kind in ("weights", "average")},
        "statistics": {
            kind: {name: apart(value, expected, kind, name) for name, value in found.items()}
            for kind, found in buffers.items()
        },
        **digests(engine),
        "pieces": [(part.name, part.offset, part.value.numel()) for part in parts],
    }


def digests(engine: Engine) -> dict[str, str]:
    """Of the weights, moments and averages that this rank owns, and of the running statistics and theirs."""
    parts = list(engine.fragments(owned=True))
    return {
        "buffers": digest(value for _, value in sorted(engine.buffers().items())),
        "state": digest(tensor for part in parts for tensor in (part.value, *part.moments.values())),
    }


def squares(parts: Iterable[Fragment], kind: str, expected: dict[str, Arrays]) -> tuple[float, float]:
    """Sums of squares over this rank's pieces: of the distance from the reference, and of the way that one went."""
    wrong = way = 0.0
    for part in parts:
        piece = slice(part.offset, part.offset + part.value.numel())
        mine = part.value if kind == "weights" else part.moments["ema"]
        end, start = (expected[place][part.name].reshape(-1)[piece].double() for place in (kind, "start"))
        wrong += float((mine.double() - end).square().sum())
        way += float((end - start).square().sum())
    return wrong, way


def apart(value: Tensor, expected: dict[str, Arrays], kind: str, name: str) -> float:
    """The largest distance of a running statistic from the reference's, means and variances each in its own unit."""
    end = expected[kind][name]
    variance = expected[kind][name.replace("running_mean", "running_var")]
    return float(((value - end).abs() / (variance if end is variance else variance.sqrt())).max())


def digest(tensors: Iterable[Tensor]) -> str:
    """Of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def micros(engine: Engine, run: Run, step: int, poisoned: bool) -> Iterator[Micro]:
    """The micro-batches of this rank's replica in a step."""
    images, wanted, seeds = global_batch(step, run.model.resolution)
    if poisoned:
        images[-1, 0, 5, 5] = torch.inf  # of the last replica alone
    model, member = engine.model, engine.member
    assert isinstance(model, coatnet.CoAtNet)
    for low, high in engine.layout.slices(member.replica):
        drop = drop_path.scales(seeds[low:high], model.drop_rates) if run.model.drop_path else None
        inputs = images[low:high].contiguous(memory_format=torch.channels_last)
        yield Micro(inputs if member.begins else None, wanted[low:high] if member.ends else None, drop)


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
    torch.set_num_threads(1)
    answers = {}
    for name, case in cases.items():
        answers[name] = plain(case) if case.get("plain") else under_engine(case, member)
    Path(f"{out_file}.{member.rank}").write_text(json.dumps(answers))
    cluster.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
