"""Every layout's checkpoint continued in every layout, and how far the rest of the run is from an undisturbed one."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import resolve
from configs.schema import (
    Augment,
    Checkpoint,
    Cluster,
    Data,
    Evaluate,
    Model,
    Norm,
    Optim,
    Parallel,
    Precision,
    Run,
    Tracking,
)  # fmt: skip
from data_pipeline.building.build import Picture, write_dataset
from trainer.launch import free_port, launch
from trainer.state.diff import BUFFERS, compare

Layout = tuple[int, int, int]  # stages of the pipeline, replicas, ZeRO
Cases = dict[str, tuple[Layout, dict[str, Any]]]
LAYOUTS: tuple[Layout, ...] = ((1, 1, 0), (1, 2, 3), (2, 1, 1), (2, 2, 3), (1, 4, 1), (1, 3, 2))
PICTURES, CLASSES = 130, 5
BATCH, GROUP, MICRO = 48, 4, 4  # so that 1, 2, 3 and 4 replicas have whole BatchNorm groups and micro-batches
AT, STEPS = 5, 10  # updates at the checkpoint, and in all
BOUND = 1e-5  # of a step's loss, fp32


@dataclass
class Found:
    """How the rest of a run in layout `to`, from a checkpoint of layout `source`, compares with `source`'s own.

    Attributes:
        loss: the largest difference of a step's loss.
        weights, average, moments, statistics: the largest difference of an element at the end, see `shares`.
        bitwise: whether all tensors at the end are the same to the bit, and all losses.
        samples: whether every step took the same samples, each once.
        score: the largest difference of an evaluation's scores.
    """

    source: Layout
    to: Layout
    loss: float
    weights: float
    average: float
    moments: float
    statistics: float
    bitwise: bool
    samples: bool
    score: float
    wrong: list[str] = field(default_factory=list)


def write_pictures(folder: Path) -> None:
    """Noise over a pattern of its class: no two values of a window are so near that rounding chooses the larger one."""

    def encoded(number: int) -> bytes:
        draw = np.random.default_rng(number)
        waves = np.sin(np.arange(40) * (number % CLASSES + 1) * 0.3) * 60 + 128
        pixels = (waves[None, :, None] + draw.normal(0, 30, (40, 40, 3))).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()

    found = [Picture(f"p{n:04d}", "png", (n % CLASSES,), f"p{n:04d}", partial(encoded, n)) for n in range(PICTURES)]
    write_dataset(found, folder, [str(number) for number in range(CLASSES)], "single", {}, 7)


def name_of(layout: Layout) -> str:
    """A layout in a name."""
    return "-".join(map(str, layout))


def run_of(folder: Path, name: str, layout: Layout) -> dict[str, Any]:
    """The run in a layout, as JSON; all have the same mathematics."""
    parallel: dict[str, Any] = {"pipeline": layout[0], "zero": layout[2], "micro_batch": MICRO, "recompute": "full"}
    run = Run(
        recipe="elastic",
        name=name,
        runs=str(folder / "runs"),
        seed=5,
        model=Model(name="parity", resolution=32, drop_path=0.1),
        norm=Norm(replica_batch=GROUP, momentum=0.1),
        data=Data(path=str(folder / "data"), global_batch=BATCH, workers=0, lanes=6),
        augment=Augment(randaugment_layers=0),
        optim=Optim(lr=1e-3, eps=1e-2, schedule="constant", steps=STEPS, warmup_steps=0, clip_norm=0.5, ema=0.9),
        parallel=Parallel(**parallel),
        precision=Precision(dtype="fp32"),
        checkpoint=Checkpoint(every=AT, keep=9),
        evaluate=Evaluate(),
        tracking=Tracking(mlflow=False, log_every=1),
        cluster=Cluster(device="cpu", timeout=120),
    )
    document: dict[str, Any] = json.loads(resolve.to_json(run))
    return document


def walk(cases: dict[str, dict[str, Any]], world: int, folder: Path) -> dict[str, list[Any]]:
    """Walk cases on so many ranks; what they took by case, all ranks together."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    words = ["tests.parallel.elastic_worker", str(folder / "cases.json"), str(folder / "out")]
    code = launch(words, world, folder / "logs", free_port(), True)
    if code:
        raise RuntimeError(f"a rank of {world} failed with exit code {code}; see {folder}/logs")
    ranks = [json.loads((folder / f"out.{rank}").read_text()) for rank in range(world)]
    assert all(rank[name]["code"] == 0 for rank in ranks for name in cases)
    return {name: [entry for rank in ranks for entry in rank[name]["taken"]] for name in cases}


def matrix(layouts: Sequence[Layout], folder: Path, one_pool: bool = False) -> list[Found]:
    """Every layout's checkpoint continued in every layout.

    Args:
        folder: for data, runs and logs.
        one_pool: all layouts are of one world: its processes walk everything.
    """
    write_pictures(folder / "data")
    worlds = sorted({pipeline * replicas for pipeline, replicas, _ in layouts})
    begun: Cases = {name_of(to): (to, {"run": run_of(folder, name_of(to), to)}) for to in layouts}
    continued: Cases = {}
    for source, to in product(layouts, layouts):
        name = f"{name_of(source)}-to-{name_of(to)}"
        place = {"folder": str(folder / "runs" / name_of(source)), "step": AT}
        continued[name] = (to, {"run": run_of(folder, name, to), **place})
    taken: dict[str, list[Any]] = {}
    for number, phase in enumerate([begun | continued] if one_pool else [begun, continued]):
        for world in worlds:
            mine = {name: case for name, (layout, case) in phase.items() if layout[0] * layout[1] == world}
            taken |= walk(mine, world, folder / f"phase{number}-world{world}") if mine else {}
    return [measured(source, to, folder / "runs", taken) for source, to in product(layouts, layouts)]


def measured(source: Layout, to: Layout, runs: Path, taken: dict[str, list[Any]]) -> Found:
    """What came of one continuation."""
    whole, part = name_of(source), f"{name_of(source)}-to-{name_of(to)}"
    losses = [logged(runs / name) for name in (whole, part)]
    far = max(abs(losses[0][step] - losses[1][step]) for step in range(AT + 1, STEPS + 1))
    found = compare(*(runs / name / "checkpoints" / f"step-{STEPS:08d}" for name in (whole, part)))
    share = shares(found["tensors"])
    expected = sorted(row for row in map(tuple, taken[whole]) if row[0] >= AT * BATCH)
    scores = [json.loads((runs / name / "evaluation.json").read_text()) for name in (whole, part)]
    return Found(
        source=source,
        to=to,
        loss=far,
        weights=share.get("value", 0.0),
        average=share.get("ema", 0.0),
        moments=max(share.get("exp_avg", 0.0), share.get("exp_avg_sq", 0.0)),
        statistics=share.get("statistics", 0.0),
        bitwise=not found["tensors"] and all(losses[0][step] == losses[1][step] for step in losses[1]),
        samples=sorted(map(tuple, taken[part])) == expected and len(expected) == (STEPS - AT) * BATCH,
        score=max(abs(scores[0][key] - scores[1][key]) for key in scores[0]),
        wrong=found["only"],
    )


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest difference of an element of each kind, as a share of its tensor's largest one.

    Some tensors hold nothing but rounding, such as biases that a BatchNorm takes away again: no scale is below a
    hundredth of the largest of the kind.
    """
    found: dict[str, float] = {}
    largest: dict[str, float] = {}
    for row in rows:
        largest[row["kind"]] = max(largest.get(row["kind"], 0.0), row["scale"])
    for row in rows:
        kind = row["kind"] if row["kind"] != BUFFERS else "statistics"
        found[kind] = max(found.get(kind, 0.0), row["largest"] / max(row["scale"], largest[row["kind"]] / 100))
    return found


def logged(folder: Path) -> dict[int, float]:
    """A run's losses by step."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
