"""Every layout's checkpoint continued in every layout, beside the run that goes on where it was.

    python tests/benchmarks/elastic.py [FOLDER]

Writes the record `elastic` to FOLDER, tests/records unless it is given, and prints its table. Worlds of 1 to 4
processes follow each other; on two cores they take about ten minutes, and 4 GB of memory.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.parallel.elastic import AT, BATCH, BOUND, LAYOUTS, STEPS, Found, matrix, name_of  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import environment  # noqa: E402

COLUMNS = ("loss", "weights", "average", "moments", "statistics", "score", "bitwise", "samples")


def summarise(found: list[Found]) -> dict[str, str]:
    """The largest value of each column."""
    worst = ", ".join(f"{name} {max(getattr(cell, name) for cell in found):.1e}" for name in COLUMNS[:6])
    same = [cell for cell in found if cell.source == cell.to]
    return {
        "changes of layout": f"{len(found)}, losses within {BOUND:.0e} in {sum(cell.loss <= BOUND for cell in found)}",
        "at worst": worst,
        "same layout": f"{sum(cell.bitwise for cell in same)} of {len(same)} the same to the bit",
        "samples": f"{sum(cell.samples for cell in found)} of {len(found)} took exactly the same",
    }


def values(cell: Found) -> list[float]:
    """A cell's columns."""
    return [float(getattr(cell, name)) for name in COLUMNS]


def main(folder: Path) -> None:
    """Measure and write."""
    facts = environment.facts("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        found = matrix(LAYOUTS, Path(scratch))
    record = bench.Record(
        name="elastic",
        command="python tests/benchmarks/elastic.py",
        facts=facts,
        config={
            "columns": COLUMNS, "meaning": "tests/parallel/elastic.py, Found", "layouts": "pipeline-replicas-ZeRO",
            "changed after step": AT, "steps": STEPS, "samples of a step": BATCH,
        },
        unit="differences from the run that goes on where it was, in the order of config.columns",
        samples={f"{name_of(cell.source)} to {name_of(cell.to)}": values(cell) for cell in found},
        summary=summarise(found),
    )  # fmt: skip
    print("\n".join(f"{name}: {values}" for name, values in record.samples.items()))
    print(record.write(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "records")
