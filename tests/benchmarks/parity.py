"""Every allowed layout beside one plain process: pipeline x data x ZeRO x recomputation x precision.

    python tests/benchmarks/parity.py [FOLDER]

Writes the record `parity` to FOLDER, tests/records unless it is given, and prints its table. The worlds of 1, 2, 4 and
8 processes follow each other; on two cores they take about ten minutes, and 8 GB of memory.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.parallel import parity  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import environment  # noqa: E402

COLUMNS = ("loss", "fall", "norm", "replicas", "missing", "statistics", "weights", "average", "logits", "recompute")


def summarise(found: dict[parity.Cell, dict[str, float]]) -> dict[str, str]:
    """The largest value of each column by precision, and how many cells keep all bounds."""
    kept = sum(not parity.broken(values, cell.dtype) for cell, values in found.items())
    summary = {"cells": f"{kept} of {len(found)} keep every bound"}
    for dtype in ("fp32", "bf16"):
        of_it = [values for cell, values in found.items() if cell.dtype == dtype]
        worst = [f"{name} {max(values[name] for values in of_it):.1e}" for name in COLUMNS if name != "fall"]
        fall = f"fall {min(values['fall'] for values in of_it):.0%}"
        summary[f"{dtype} at worst"] = ", ".join([*worst, fall])
    return summary


def table(found: dict[parity.Cell, dict[str, float]]) -> str:
    """All cells as Markdown."""
    rows = [f"| cell | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for cell, values in found.items():
        rows.append(f"| {cell.name} | {' | '.join(f'{values[name]:.2g}' for name in COLUMNS)} |")
    return "\n".join(rows)


def main(folder: Path) -> None:
    """Measure and write."""
    facts = environment.facts("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        found = parity.whole(Path(scratch))
    record = bench.Record(
        name="parity",
        command="python tests/benchmarks/parity.py",
        facts=facts,
        config={
            "columns": COLUMNS,
            "meaning": "tests/parallel/parity.py, measure()",
            "bounds": {**parity.BOUNDS, "fall": parity.LEAST_FALL},
            "steps": 20,
            "samples of a micro-batch": parity.MICRO,
            "pixels": parity.SIZES,
        },
        unit="differences from one plain process, in the order of config.columns",
        samples={cell.name: [values[name] for name in COLUMNS] for cell, values in found.items()},
        summary=summarise(found),
    )
    print(table(found))
    print(record.write(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "records")
