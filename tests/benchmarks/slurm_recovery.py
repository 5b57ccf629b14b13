"""Runs every row of tests/slurm/test_rows.py on the test cluster and writes the record: how soon each was undone.

python tests/benchmarks/slurm_recovery.py [PYTEST-EXPRESSION]

As root; it starts the cluster and ends it. With an expression (`pytest -k`) only these rows are run: what was measured
at this commit is kept in runs/benchmarks/, so that the whole can be measured in parts. The record needs all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from trainer.bench import record as bench
from trainer.machine import environment

ROOT = Path(__file__).parent.parent.parent
LIMITS = {"hang named": 60.0, "crash to next step": 30.0}  # seconds


def main(expression: str) -> int:
    """Measure, and write the record if nothing is missing; the exit code of pytest."""
    folder = ROOT / "runs" / "benchmarks" / f"slurm-recovery-{environment.commit()}"
    folder.mkdir(parents=True, exist_ok=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "slurm and slow", "--timeout", "3600", "-k", expression]
    tests += ["tests/slurm/test_rows.py"]
    told = {**os.environ, "COATNET_MEASURED": str(folder), "COATNET_SLURM": "1", "OMP_NUM_THREADS": "1"}
    cluster = str(ROOT / "tests" / "slurm" / "cluster" / "with.sh")
    code = subprocess.run([cluster, "--install", *tests], cwd=ROOT, env=told).returncode
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "slurm and slow", "tests/slurm/test_rows.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = {line.rpartition("::")[2] for line in listed.stdout.splitlines() if "::" in line}
    rows = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if wanted - set(rows):
        print(f"not measured yet: {', '.join(sorted(wanted - set(rows)))}")
        return code
    print(record(rows).write(ROOT / "tests" / "records"))
    return code


def record(rows: dict[str, dict[str, object]]) -> bench.Record:
    """The record of all rows."""
    samples = {}
    for name, row in rows.items():
        for what in ("noticed", "step"):
            if isinstance(row[what], float):
                samples[f"{name.removeprefix('test_')}: {what}"] = [round(float(str(row[what])), 1)]
    hangs = [values[0] for name, values in samples.items() if name.startswith("a_rank_hangs") and "noticed" in name]
    crashes = [values[0] for name, values in samples.items() if name.startswith("a_rank[") and "step" in name]
    cut = [values[0] for name, values in samples.items() if name.startswith("a_node_is_cut") and "step" in name]
    return bench.Record(
        name="slurm-recovery",
        command="python tests/benchmarks/slurm_recovery.py",
        facts=environment.facts("cpu"),
        config={"nodes": 2, "ranks a node": 1, "SlurmdTimeout": 10, "KillWait": 5, **LIMITS},
        unit="seconds from the event until the supervisor told of it, and until a step was made again",
        samples=samples,
        summary={
            "rows": f"{len(rows)}, after each losses and weights bitwise those of an undisturbed run",
            "hang named": f"within {max(hangs):.0f} s (limit {LIMITS['hang named']:.0f} s)",
            "crash to next step": f"within {max(crashes):.0f} s (limit {LIMITS['crash to next step']:.0f} s)",
            "cut node to next step elsewhere": f"within {max(cut):.0f} s",
        },
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
