"""The slow campaigns of the data pipeline: faults of a store, damage, kills and resumes, fuzz, killed builds.

    python tests/benchmarks/data_campaigns.py [FOLDER]

Runs the tests marked `slow` in FILES one after the other, a quarter of an hour on two cores, and writes the record
`data-campaigns` to FOLDER, tests/records unless it is given: what each counted (pytest's `record_property`), and how
long it took. Every case has a seed of its own, which a failure names. Nothing is written if one fails.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from trainer.bench import record as bench  # noqa: E402
from trainer.machine import environment  # noqa: E402

FILES = (
    "tests/faults/test_store.py",
    "tests/unit/data_pipeline/test_damage.py",
    "tests/faults/test_resume_matrix.py",
    "tests/unit/data_pipeline/test_fuzz.py",
    "tests/unit/data_pipeline/building/test_build_tasks.py",
)


def run(file: str) -> tuple[Counter[str], dict[str, float]]:
    """What the slow tests of a file counted, and the seconds of each.

    Raises:
        SystemExit: one failed, or there was none.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-q", "-m", "slow", "--timeout", "7200", "-o", "junit_family=xunit1", f"--junitxml={report}", file]
        if subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, check=False).returncode:
            sys.exit(f"{file}: failed; nothing is written")
        cases = list(ElementTree.parse(report).iter("testcase"))
    counted: Counter[str] = Counter()
    for found in (element for case in cases for element in case.iter("property")):
        counted[str(found.get("name"))] += int(str(found.get("value")))
    return counted, {str(case.get("name")): float(str(case.get("time"))) for case in cases}


def main(folder: Path) -> None:
    """Run all and write the record."""
    facts = environment.facts("cpu")
    counted: Counter[str] = Counter()
    seconds: dict[str, list[float]] = {}
    for file in FILES:
        counts, times = run(file)
        counted += counts
        seconds |= {f"{Path(file).stem}: {name}": [time] for name, time in times.items()}
    record = bench.Record(
        name="data-campaigns",
        command="python tests/benchmarks/data_campaigns.py",
        facts=facts,
        config={"files": FILES, "counted": dict(counted)},
        unit="seconds of each campaign",
        samples=seconds,
        summary={name: f"{count:,}" for name, count in counted.items()}
        | {"lost, repeated, wrong or read without an error": "none"},
    )
    print(record.write(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "records")
