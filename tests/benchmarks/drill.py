"""Practises every fault of the catalogue on a tiny run of two processes and writes the record `drill`.

python tests/benchmarks/drill.py [FOLDER]

The record goes to FOLDER, tests/records unless it is given. About ten minutes on two quiet cores.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from trainer.bench import record as bench  # noqa: E402
from trainer.commands import drill as cli_drill  # noqa: E402
from trainer.health import drill  # noqa: E402
from trainer.health.faults import CATALOGUE  # noqa: E402
from trainer.machine import environment  # noqa: E402

RANKS = 2


def summarise(found: dict[str, Any]) -> dict[str, str]:
    """What a reader wants to know of each fault."""
    results = found["results"]
    bitwise = sum(row["losses"] == "bitwise" for row in results)
    summary = {
        "faults": f"{sum(not row['problem'] for row in results)} of {len(results)} survived",
        "losses of all steps": f"bitwise those of an undisturbed run after {bitwise} of them",
    }
    for row in results:
        told = "not survived" if row["problem"] else f"noticed {row['detection']:.1f} s, back {row['recovery']:.1f} s"
        summary[row["fault"]] = told
    return summary


def main(folder: Path) -> int:
    """Practise and write."""
    with tempfile.TemporaryDirectory() as scratch:
        found = drill.drill(list(CATALOGUE), Path(scratch) / "runs", RANKS, lambda text: print(text, flush=True))
    print(cli_drill.table(found))
    rows = {row["fault"]: row for row in found["results"] if row["detection"] is not None}
    samples = {f"{name}, noticed": [row["detection"]] for name, row in rows.items()}
    samples |= {f"{name}, back": [row["recovery"]] for name, row in rows.items()}
    record = bench.Record(
        name="drill",
        command="python tests/benchmarks/drill.py",
        facts=environment.facts(found["device"]),
        config={"ranks": found["ranks"], "steps": drill.STEPS, "saves every": drill.EVERY, "costs": found["costs"]},
        unit="seconds",
        samples=samples,
        summary=summarise(found),
    )
    print(record.write(folder))
    return int(any(row["problem"] for row in found["results"]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "records"))
