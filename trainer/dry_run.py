"""Everything that is known about a run before it starts, for `coatnet train RECIPE --dry-run`."""

import json

from configs import resolve
from configs.schema import Run
from data_pipeline.manifest import Dataset
from models import coatnet, cost, drop_path, spec
from trainer.cost.ledger import P_REF, U_REF
from trainer.engine.deepspeed_config import deepspeed_config, weights
from trainer.engine.optim import learning_rate, parameter_groups
from trainer.plan import Layout
from trainer.planning.fit import Memory
from trainer.stages import partition


def describe(run: Run, dataset: Dataset, plan: Layout, memory: Memory, available: int) -> str:
    """The resolved configuration, layout, DeepSpeed's JSON, parameter groups, schedule, counts, data and memory.

    With a pipeline its stages too; the JSON is then of the one with the most parameters, and the memory, which is of
    the stage that needs most, says which that is.
    """
    found = spec.of(run.model)
    counts = cost.count(found, run.model.resolution, classes=dataset.classes)
    split = dataset.split("train")
    images = resolve.total_steps(run, split.samples) * run.data.global_batch
    flops = 6 * counts.multiply_adds * images
    cut = partition.stages(run, dataset.classes, plan.micro_batch)
    heaviest = max(range(plan.stages), key=lambda number: cut[number].parameters)
    sizes = weights(run, dataset.classes, cut[heaviest].first, cut[heaviest].last)
    staged = {"stages": partition.table(cut)} if plan.stages > 1 else {}
    sections = {
        "configuration": resolve.to_json(run),
        "layout": layout(plan),
        **staged,
        "DeepSpeed" + (f" (stage {heaviest}, with the most parameters)" if staged else ""): json.dumps(
            deepspeed_config(run, plan, sizes), indent=2
        ),
        "parameter groups": groups(run, dataset.classes),
        "schedule": schedule(run, split.samples),
        "stochastic depth": rates(run, dataset.classes),
        "counts": (
            f"{counts.parameters:,} parameters, {counts.multiply_adds:,} multiply-adds an image; {images:,} images are "
            f"{flops:.4g} model FLOPs, {flops / (86400 * P_REF * U_REF):.4g} TPUv3-core-days at {U_REF:.0%} of peak"
        ),
        "data": (
            f"{dataset.root}: {dataset.classes} classes, {dataset.label_kind} labels; "
            f"{split.samples:,} training samples in {len(split.counts):,} shards, "
            f"{dataset.split('heldout').samples:,} held out; fingerprint {split.fingerprint[:12]}"
        ),
        "memory": (
            f"about {memory.total / 1e9:.2f} GB a rank"
            f"{f' of stage {memory.stage}, which needs most' if staged else ''} (an estimate: {memory}), of "
            f"{available / 1e9:.1f} GB"
        ),
    }
    return "\n\n".join(f"== {title}\n{text}" for title, text in sections.items())


def layout(plan: Layout) -> str:
    """Who computes what of the global batch."""
    mesh = f"{plan.stages} stages x {plan.replicas} replicas = {plan.world} ranks; " if plan.stages > 1 else ""
    who = "replicas" if mesh else "ranks"
    return (
        f"{mesh}{plan.replicas} {who} x {plan.accumulation} micro-batches x {plan.micro_batch} images = global batch "
        f"{plan.global_batch}; BatchNorm over {plan.replica_batch} images, {plan.team} {who} a group"
    )


def groups(run: Run, classes: int) -> str:
    """AdamW's parameter groups, name by name."""
    model = coatnet.build(spec.of(run.model), resolution=run.model.resolution, classes=classes)
    lines = []
    for group in parameter_groups(model.named_parameters(), run.optim.weight_decay):
        size = sum(parameter.numel() for parameter in group["params"])
        names = group["names"]
        lines.append(
            f"{group['name']}: weight decay {group['weight_decay']:g}, {len(names)} tensors, {size:,} elements"
        )
        lines += [f"  {name}" for name in names]
    return "\n".join(lines)


def schedule(run: Run, samples: int) -> str:
    """The learning rate at the corners of its schedule."""
    steps, warmup = resolve.total_steps(run, samples), resolve.warmup(run, samples)
    marks = sorted({step for step in (0, warmup - 1, warmup, (warmup + steps) // 2, steps - 1) if 0 <= step < steps})
    points = ", ".join(f"{learning_rate(run.optim, step, steps, warmup):.3g} at {step + 1}" for step in marks)
    return f"{steps:,} updates, {warmup:,} of them warm-up, {run.optim.schedule}; learning rate {points}"


def rates(run: Run, classes: int) -> str:
    """The drop rate of the first and the last blocks."""
    blocks = [b for b in cost.count(spec.of(run.model), run.model.resolution, classes=classes).blocks
              if b.stage not in ("s0", "head")]  # fmt: skip
    values = drop_path.rates(len(blocks), run.model.drop_path)
    return f"{len(blocks)} blocks, {values[0]:.3f} in {blocks[0].name} to {values[-1]:.3f} in {blocks[-1].name}"
