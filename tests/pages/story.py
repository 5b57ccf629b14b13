"""A run folder with a story, without training: a crash and a way back, damaged samples, scores, machines, pictures.

Sums, holdings, data card and pictures are made by the trainer's own code; figures and events are made up, at made-up
times, in the files' own format.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configs import resolve
from configs.schema import Run
from data_pipeline.synthetic import synthetic_dataset
from trainer.cost.ledger import Holding, Ledger
from trainer.evaluation.examples import thumbnail
from trainer.health.goodput import NS, Clock
from trainer.tracking import data_card
from trainer.tracking.journal import Journal

BEGAN = 1_790_000_000  # unix time of the first start
H100 = Holding("NVIDIA H100 80GB HBM3", 989.4e12, 2.5, "USD", 700.0, "NVML")
CLASSES = 12
SECONDS = 20  # a step
EVERY = 10  # steps between two lines
CRASH, BACK, STEPS = 180, 150, 300
RATE = 4096 / SECONDS


def run_of(runs: Path, name: str, **optim: Any) -> Run:
    """CoAtNet-5's recipe with other settings."""
    plain = resolve.load("coatnet5-jft300m-224")
    return replace(plain, name=name, runs=str(runs), optim=replace(plain.optim, steps=STEPS, warmup_steps=30, **optim))


def write(runs: Path, name: str = "story", worse: float = 1.0, **optim: Any) -> Path:
    """Write the folder.

    Args:
        runs: where it lies.
        name: of the run.
        worse: factor of the losses.
        optim: settings of the optimizer.
    """
    run = run_of(runs, name, **optim)
    folder = Path(run.folder)
    for inner in ("events", "system"):
        (folder / inner).mkdir(parents=True)
    (folder / "run.json").write_text(resolve.to_json(run))
    (folder / "done").write_text(f"{STEPS}\n")
    data_card.write(folder, synthetic_dataset(CLASSES))
    environment = {"device": H100.device, "cpu": "a chip", "cores": 64, "commit": "0123456789ab+",
                   "versions": {"torch": "2.99"}}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    _lines(folder / "metrics.jsonl", (line for line in figures(run, worse)))
    _lines(folder / "events" / "rank-00000.jsonl", happenings())
    _lines(folder / "system" / "node1.jsonl", machine())
    _lines(folder / "bad-samples.jsonl", damaged())
    scores = {"step": STEPS, "eval/top1": 0.8123 / worse, "eval/top5": 0.95, "eval/samples": 10000.0}
    (folder / "evaluation.json").write_text(json.dumps(scores))
    (folder / "examples.json").write_text(json.dumps(examples()))
    _clock(folder)
    return folder


def step_time(step: int, again: bool) -> float:
    """When a step ended: the second attempt begins ten minutes after the crash."""
    if again:
        return BEGAN + 60 + CRASH * SECONDS + 600 + (step - BACK) * SECONDS
    return BEGAN + 60 + step * SECONDS


def figures(run: Run, worse: float) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    passes = [(step, False) for step in range(EVERY, CRASH + 1, EVERY)]
    passes += [(step, True) for step in range(BACK + EVERY, STEPS + 1, EVERY)]
    for step, again in passes:
        # What was lost was worse, so that a page that shows it in place of what came after can be told.
        loss = worse * (0.3 + 6 * math.exp(-step / 60)) * (3.0 if step > BACK and not again else 1.0)
        values = {
            "train/loss": loss,
            "train/lr": run.optim.lr * min(1.0, step / 30) * (1 - step / STEPS),
            "train/grad_norm": 2.0 / (1 + step / 50),
            "perf/images_per_second": RATE * (1 + 0.05 * math.sin(step)),
            "perf/mfu": 0.41,
            "data/wait_fraction": 0.02,
            "memory/peak_bytes": 61e9,
            "cost/tpu_v3_core_days_flops": step * 0.01,
        }
        yield {"step": step, "time": step_time(step, again), **values}
        if step % 100 == 0:
            yield {"step": step, "time": step_time(step, again) + 5, "eval/top1": (0.4 + step / 750) / worse}


def happenings() -> Iterator[dict[str, Any]]:
    """The events of the first rank."""
    place = {"world": 8, "device": H100.device, "host": "node1", "job": "17", "cluster": "blue"}
    told = {"bytes": 57_000_000_000, "states": 20_000_000_000, "activations": 35_500_000_000, "gathered": 0, "moved": 0}
    yield {"time": BEGAN + 50, "event": "start", "step": 0, **place}
    yield {"time": BEGAN + 50, "event": "predicted", "step": 0, **told, "step_seconds": 18.0}
    for step in (50, 100, BACK):
        yield {
            "time": step_time(step, False),
            "event": "save",
            "step": step,
            "of_step": step,
            "stall": 1.0,
            "write": 4.0,
        }
    yield {"time": step_time(BACK, True) - 5, "event": "resume", "step": BACK, **place}
    yield {"time": step_time(BACK, True) - 5, "event": "predicted", "step": BACK, **told, "step_seconds": 18.0}
    yield {"time": step_time(200, True), "event": "save", "step": 200, "of_step": 200, "stall": 1.0, "write": 4.0}
    yield {"time": step_time(250, True), "event": "guard", "step": 250, "of": "spike", "action": "continue"}
    yield {"time": step_time(STEPS, True), "event": "done", "step": STEPS}


def machine() -> Iterator[dict[str, Any]]:
    """What a machine wrote about itself."""
    for minute in range(60):
        yield {"step": minute * 3, "time": BEGAN + 60.0 * minute, "cpu_utilization_percentage": 30.0 + minute % 7,
               "gpu_0_power_usage_watts": 600.0 + minute}  # fmt: skip


def damaged() -> Iterator[dict[str, Any]]:
    """Two bad samples, one of them written down twice."""
    for sample in (3, 5, 5):
        yield {"shard": "/data/train/shard-000007.tar", "sample": sample, "key": f"picture-{sample}",
               "reason": "picture cannot be decoded: <broken> & \"short\"", "time": BEGAN + 100.0}  # fmt: skip


def examples() -> dict[str, Any]:
    """Pictures and classes, as `trainer.evaluation.examples` leaves them."""
    places = []
    for number in range(9):
        pixels = torch.full((3, 48, 32), 25 * number, dtype=torch.uint8)
        top = [[number, 0.7], [(number + 1) % CLASSES, 0.2], [(number + 2) % CLASSES, 0.05]]
        places.append({"index": number, "key": f"key-{number}", "labels": [number if number % 3 else number + 1],
                       "top": top, "right": bool(number % 3), "picture": thumbnail(pixels)})  # fmt: skip
    worst = [[number, 800 + number, number / CLASSES] for number in range(CLASSES)]
    wrong = [place for place in places if not place["right"]]
    return {"step": STEPS, "score": "top-1", "classes": CLASSES, "worst": worst, "drawn": places, "wrong": wrong}


def _clock(folder: Path) -> None:
    """The sums of wall time and the ledger, over both attempts, as the clock and the ledger make them."""
    now = BEGAN * NS
    path = folder / "events" / "clock.jsonl"

    def spend(kind: Any, seconds: float) -> None:
        """Time passes."""
        nonlocal now
        with clock.of(kind):
            now += round(seconds * NS)

    multiply_adds = 142_181_474_304
    clock = Clock(8, now, now=lambda: now)
    clock.go_on(None)
    ledger = Ledger(multiply_adds, replace(H100))
    spend("restart", 60)
    spend("productive", BACK * SECONDS)
    ledger.images = BACK * 4096
    ledger.held(clock.now())
    saved, kept = clock.state(), ledger.state()
    spend("productive", (CRASH - BACK) * SECONDS)
    ledger.images = CRASH * 4096
    ledger.held(clock.now())
    clock.ledger = ledger.state()
    Journal(path, clock.line, every=60).close()
    last = json.loads(path.read_text().splitlines()[-1])
    now += 600 * NS
    clock = Clock(8, now - 60 * NS, last, now=lambda: now)
    clock.go_on(saved)
    ledger = Ledger(multiply_adds, replace(H100))
    ledger.go_on(kept, clock.ledger, clock.held)
    spend("productive", (STEPS - BACK) * SECONDS)
    ledger.images = STEPS * 4096
    ledger.held(clock.now())
    ledger.measured(8 * 2900 * 640.0, 8 * 2900.0)
    clock.ledger = ledger.state()
    Journal(path, clock.line, every=60).close()


def _lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
