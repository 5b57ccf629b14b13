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
from trainer import bench, environment

ROOT = Path(__file__).parent.parent.parent


def main(seeds: int) -> None:
    """Train each seed in a fresh folder; print and write the record."""
    samples: dict[str, list[float]] = {"top-1": [], "seconds": [], "peak bytes per rank": []}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            words = [
                "train",
                "demo-digits",
                "--seed",
                str(seed),
                "--runs",
                folder,
                "--data.path",
                str(ROOT / "data/digits"),
            ]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "trainer.cli", *words], cwd=ROOT, check=True)
            samples["seconds"].append(time.perf_counter() - began)
            run = Path(folder) / "demo-digits"
            samples["top-1"].append(json.loads((run / "evaluation.json").read_text())["eval/top1"])
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            samples["peak bytes per rank"].append(max(row.get("memory/peak_bytes", 0.0) for row in lines))
    top1, seconds = samples["top-1"], samples["seconds"]
    record = bench.Record(
        name="demo-digits",
        command=f"python tests/benchmarks/demo_digits.py {seeds}",
        facts=environment.facts("cpu"),
        config=resolve.flat(resolve.load("demo-digits")),
        unit="share, seconds, bytes; one value per seed",
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
