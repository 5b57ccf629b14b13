"""demo-clipart from several seeds, as a user would train it, beside timm's model and the classes' frequencies.

    python tests/benchmarks/demo_clipart.py [SEEDS] [--matched] [--field value ...]

Further words are overrides of every run, ours and timm's: `--optim.steps 40 --optim.warmup-steps 10` for a quick look.
ours: `coatnet train demo-clipart`, two ranks of one thread. timm: tests/benchmarks/timm_clipart.py, one process of two
threads and a loader process. With --matched its case timm-matched alone, as a record of its own. frequency: every
picture gets the classes in the order of how often the training split has them. Results are kept run by run
(tests/benchmarks/kept.py).
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from kept import ROOT, kept, spread  # type: ignore[import-not-found]  # the scripts beside this one
from timm_clipart import CASES, Pictures, precision_and_map  # type: ignore[import-not-found]

from configs import resolve
from configs.schema import Run
from data_pipeline.manifest import open_dataset
from trainer.bench import record as bench
from trainer.commands.config import resolve_command
from trainer.machine import environment

FIGURES = ("precision@1 raw", "mAP raw", "precision@1 EMA", "mAP EMA")


def ours(words: list[str]) -> dict[str, float]:
    """Run `coatnet train demo-clipart` in a fresh folder: its scores and the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainer.cli", "train", "demo-clipart", "--runs", folder, *words]
        began = time.perf_counter()
        subprocess.run([*command, "--tracking.no-mlflow"], cwd=ROOT, check=True)
        seconds = time.perf_counter() - began
        scores = json.loads((Path(folder) / "demo-clipart" / "evaluation.json").read_text())
    names = ("eval/top1", "eval/map", "eval_ema/top1", "eval_ema/map")
    return {figure: scores[name] for figure, name in zip(FIGURES, names, strict=True)} | {"seconds": seconds}


def timm(case: str, words: list[str]) -> dict[str, float]:
    """The same of timm's model."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.json"
        script = str(Path(__file__).with_name("timm_clipart.py"))
        began = time.perf_counter()
        subprocess.run([sys.executable, script, str(out), case, *words], cwd=ROOT, check=True)
        seconds = time.perf_counter() - began
        found: dict[str, float] = json.loads(out.read_text())
    return found | {"seconds": seconds}


def frequency(run: Run) -> tuple[float, float]:
    """(precision@1, mean average precision) of the training split's label counts as scores of every picture.

    All pictures score alike in a class, so that its average precision is the share of pictures that carry it.
    """
    dataset = open_dataset(run.data.path)
    positive_NK = Pictures(dataset, "heldout", run.data.max_pixels).positive()
    assert dataset.label_counts is not None, "`coatnet data demo` counts the labels"
    scores_K = torch.tensor(dataset.label_counts, dtype=torch.float64)
    found: tuple[float, float] = precision_and_map(scores_K.expand(len(positive_NK), -1), positive_NK)
    return found


def main(seeds: int, words: list[str]) -> None:
    """Train every case from every seed; print and write the record."""
    matched = "--matched" in words
    cases = ["timm-matched"] if matched else ["ours", "timm"]
    given = ["--data.path", str(ROOT / "data/clipart"), *(word for word in words if word != "--matched")]
    run = resolve_command("demo-clipart", given)
    samples: dict[str, list[float]] = {}
    for case in cases:  # the case this is about first, so that a chain cut short has it
        for seed in range(seeds):
            more = [*given, "--seed", str(seed)]
            work = functools.partial(ours, more) if case == "ours" else functools.partial(timm, case, more)
            for figure, value in kept(f"clipart-{case}", resolve_command("demo-clipart", more), work).items():
                samples.setdefault(f"{case} {figure}", []).append(value)
    summary = {}
    for case in cases:
        scores = ", ".join(f"{figure} {spread(samples[f'{case} {figure}'])}" for figure in FIGURES)
        summary[case] = f"{scores}, {statistics.median(samples[f'{case} seconds']):.0f} s"
    first, mean = frequency(run)
    samples |= {"frequency precision@1": [first], "frequency mAP": [mean]}
    summary["classes' frequency"] = f"precision@1 {first:.2%}, mAP {mean:.2%}"
    record = bench.Record(
        name="demo-clipart-matched" if matched else "demo-clipart",
        command=" ".join(["python tests/benchmarks/demo_clipart.py", str(seeds), *words]),
        facts=environment.facts("cpu"),
        config=resolve.flat(run)
        | {f"{name}.{key}": v for name, case in CASES.items() for key, v in case._asdict().items()},
        unit="share of held-out pictures, seconds of the whole command; one value per seed",
        samples=samples,
        summary=summary,
    )
    print(record.write(ROOT / "tests" / "records"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:])
