"""Results of long measurements, kept as they come, so that a benchmark cut short goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path

from configs import resolve
from configs.schema import Run
from trainer.machine import environment

ROOT = Path(__file__).parent.parent.parent


def kept(case: str, run: Run, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures of one case: read where this commit has measured it with this configuration, else measured now.

    They lie in runs/benchmarks/, one file for each case, configuration and commit.
    """
    folder = ROOT / "runs" / "benchmarks"
    file = folder / f"{case}-seed{run.seed}-{resolve.digest(run)[:12]}-{environment.commit()}.json"
    if not file.exists():
        figures = measure()
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{case}, seed {run.seed}: {figures}", flush=True)
    found: dict[str, float] = json.loads(file.read_text())
    return found


def spread(values: list[float]) -> str:
    """Mean and range of shares, for a record's summary."""
    return f"{sum(values) / len(values):.2%} ({min(values):.2%} to {max(values):.2%})"
