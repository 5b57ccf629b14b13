"""Trains demo-digits from three seeds as a user would and writes the record: accuracy, time, peak memory.

python tests/benchmarks/demo_digits.py [SEEDS]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configs import resolve
from trainer.bench import record as bench
from trainer.machine import environment

ROOT = Path(__file__).parent.parent.parent


def train_digits(seed: int, *words: str) -> dict[str, float]:
    """Run `coatnet train demo-digits` from `seed` in a fresh folder.

    Args:
        words: further overrides, `--field value`.

    Returns:
        top-1 (held-out share), seconds (of the whole command), images/s (median over the log lines), and the peak
        bytes of the first rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = ["--seed", str(seed), "--runs", folder, "--data.path", str(ROOT / "data/digits"), *words]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "trainer.cli", "train", "demo-digits", *given], cwd=ROOT, check=True)
        seconds = time.perf_counter() - began
        run = Path(folder) / "demo-digits"
        scores = json.loads((run / "evaluation.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["perf/images_per_second"] for row in lines if "perf/images_per_second" in row]
    return {
        "top-1": scores["eval/top1"],
        "seconds": seconds,
        "images/s": statistics.median(speeds),
        "peak bytes per rank": max(row.get("memory/peak_bytes", 0.0) for row in lines),
    }


def main(seeds: int) -> None:
    """Train each seed; print and write the record."""
    runs = [train_digits(seed) for seed in range(seeds)]
    samples = {name: [figures[name] for figures in runs] for name in runs[0]}
    top1, seconds = samples["top-1"], samples["seconds"]
    record = bench.Record(
        name="demo-digits",
        command=f"python tests/benchmarks/demo_digits.py {seeds}",
        facts=environment.facts("cpu"),
        config=resolve.flat(resolve.load("demo-digits")),
        unit="share, seconds, images/s, bytes; one value per seed",
        samples=samples,
        summary={
            "held-out top-1": f"{statistics.mean(top1):.2%} ({min(top1):.2%} to {max(top1):.2%}, {seeds} seeds)",
            "whole command": f"{statistics.median(seconds):.0f} s (median)",
            "peak memory per rank": f"{max(samples['peak bytes per rank']) / 1e9:.2f} GB",
        },
    )
    print(record.write(ROOT / "tests" / "records"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
