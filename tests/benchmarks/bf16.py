"""bf16 autocast over fp32 parameters against fp32 on demo-digits: accuracy and speed, from the same seeds in turn.

python tests/benchmarks/bf16.py [SEEDS] [--field value ...]

Further words are overrides of both runs, `--optim.steps 20 --optim.warmup-steps 5` for a quick look.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from demo_digits import train_digits  # type: ignore[import-not-found]  # the script beside this one

from configs import resolve
from trainer import bench, environment

ROOT = Path(__file__).parent.parent.parent
PRECISIONS = ("fp32", "bf16")
FIGURES = ("top-1", "images/s")


def main(seeds: int, words: list[str], records: Path) -> None:
    """Train every seed in both precisions, first the one, then the other; print and write the record."""
    samples: dict[str, list[float]] = {f"{name} {figure}": [] for name in PRECISIONS for figure in FIGURES}
    for seed in range(seeds):
        for name in PRECISIONS if seed % 2 == 0 else reversed(PRECISIONS):
            found = train_digits(seed, "--precision.dtype", name, "--tracking.no-mlflow", *words)
            for figure in FIGURES:
                samples[f"{name} {figure}"].append(found[figure])
    summary: dict[str, Any] = {}
    for name in PRECISIONS:
        top1, speed = samples[f"{name} top-1"], samples[f"{name} images/s"]
        summary[name] = (
            f"top-1 {statistics.mean(top1):.2%} ({min(top1):.2%} to {max(top1):.2%}, {seeds} seeds), "
            f"{statistics.median(speed):.1f} images/s"
        )
    ratio = bench.median_ratio(samples["bf16 images/s"], samples["fp32 images/s"])
    summary["speed of bf16 over fp32"] = f"{ratio:.2f}x"
    record = bench.Record(
        name="bf16-digits",
        command=" ".join(["python tests/benchmarks/bf16.py", str(seeds), *words]),
        facts=environment.facts(device()),
        config=resolve.flat(resolve.load("demo-digits")),
        unit="share of held-out pictures, images/s; one value per seed",
        samples=samples,
        summary=summary,
    )
    print(record.write(records))


def device() -> str:
    """The name of what demo-digits trains on here."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:], ROOT / "tests" / "records")
