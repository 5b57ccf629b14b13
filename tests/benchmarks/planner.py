"""The planner beside the real trainer: rates learnt from some networks, scored on other networks and layouts.

    python tests/benchmarks/planner.py [FOLDER] [--only N] [--gpu]

Writes the record `planner-cpu` to FOLDER, tests/records unless it is given. The runs lie in runs/benchmarks/planner-cpu
and are not made again while they are there, so that a campaign goes on where it was cut short; --only N stops after N
new runs. On two cores the whole takes about 25 minutes, one run after the other, and 8 GB of memory.

With --gpu the same on the first GPU of this machine, CoAtNet-0 to -7 without a pipeline: `planner-cuda`; 80 GB. A run
that fails there is left out, and named in the record; --seconds N begins no new run after so long.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from configs.schema import Run  # noqa: E402
from models.activations import Device  # noqa: E402
from tests.parallel import planned  # noqa: E402
from trainer import launch  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.bench import step as bench_step  # noqa: E402
from trainer.machine import environment  # noqa: E402
from trainer.planning import auto_layout  # noqa: E402
from trainer.planning.machines import Machines  # noqa: E402
from trainer.planning.rates import Rates  # noqa: E402

COLUMNS = ("states", "saved", "peak", "seconds")


def table(found: list[planned.Score]) -> str:
    """Every rank's errors in percent."""
    rows = [f"| cell, rank | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for score in found:
        wrong = score.wrong()
        cells = [f"{100 * wrong[name]:+.1f} %" + (" !" if name in score.broken() else "") if name in wrong else "-"
                 for name in COLUMNS]  # fmt: skip
        rows.append(f"| {score.cell.name}, {score.rank} | {' | '.join(cells)} |")
    return "\n".join(rows)


def summarise(found: list[planned.Score], speed: Rates, machines: Machines, device: Device) -> dict[str, str]:
    """The worst and the mean error of each figure, and apart those of networks that were not learnt from."""
    others = [score for score in found if score.cell.model not in planned.LEARNT[device]]
    lines = {name: errors(found, name) for name in COLUMNS}
    lines |= {f"{name}, networks not learnt from": errors(others, name) for name in COLUMNS}
    return {
        "cells": str(len({score.cell for score in found})),
        **{name: line for name, line in lines.items() if line},
        **bench_step.shown(speed, machines),
    }


def errors(found: list[planned.Score], name: str) -> str:
    """Of one figure, in a line; empty where it was not measured."""
    wrong = {f"{score.cell.name}, rank {score.rank}": score.wrong()[name] for score in found if name in score.wrong()}
    if not wrong:
        return ""
    worst = max(wrong, key=lambda key: abs(wrong[key]))
    mean = sum(map(abs, wrong.values())) / len(wrong)
    kept = sum(abs(value) <= planned.BOUNDS[name] for value in wrong.values())
    return (
        f"{mean:.1%} off on the average, {wrong[worst]:+.1%} at most ({worst}); {kept} of {len(wrong)} within "
        f"{planned.BOUNDS[name]:.0%}"
    )


def facts_of(runs: Path, run: Run) -> dict[str, Any]:
    """Facts of the machine that makes, or made, the runs."""
    path = runs / "facts.json"
    if not path.exists():
        runs.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(environment.facts(auto_layout.device_name(run)), indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@dataclass
class Budget:
    """New runs that may still begin, and until when; below zero and infinity: all."""

    runs: int
    until: float

    def spent(self) -> bool:
        """Whether no other run may begin; counts it if it may."""
        self.runs -= 1
        return self.runs == -1 or time.monotonic() > self.until


Ranks = list[dict[str, Any]]


def measured(cells: list[planned.Cell], runs: Path, start: planned.Start, budget: Budget) -> dict[planned.Cell, Ranks]:
    """What the ranks of each cell noted, of those on a GPU without the ones that failed."""
    found = {}
    for cell in cells:
        if not (runs / cell.name / "planned-rank-00000.json").exists() and budget.spent():
            print(f"stopped before {cell.name}")
            continue
        try:
            found[cell] = planned.measure(cell, runs, start)
        except Exception as error:
            if cell.device == "cpu":
                raise
            print(f"{cell.name}: {error!r}", flush=True)
    return found


def starter(device: Device) -> planned.Start:
    """How runs are started: each as processes of its own, on a GPU all in this one."""
    if device == "cpu":
        return launch.launch
    from tests.parallel import inline  # imports torch and DeepSpeed, which the runs on a processor must not find there

    return inline.start


def main(folder: Path, budget: Budget, device: Device) -> None:
    """Measure what is missing, score all, write."""
    runs = ROOT / "runs" / "benchmarks" / f"planner-{device}"
    start = starter(device)
    cells = planned.cells(device)
    facts = facts_of(runs, cells[0].run)
    learnt = planned.learn(runs, device, start)
    noted = measured(cells, runs, start, budget)
    missing = [cell.name for cell in cells if cell not in noted]
    if missing and device == "cpu":
        return
    speed = planned.rates_from(learnt, facts["device"])
    found = [score for cell, ranks in noted.items() for score in planned.scores(cell, ranks, speed, facts["device"])]
    print(table(found))
    record = bench.Record(
        name=f"planner-{device}",
        command="python tests/benchmarks/planner.py" + (" --gpu" if device == "cuda" else ""),
        facts=facts,
        config={
            "columns": COLUMNS, "bounds": planned.BOUNDS, "sizes": planned.SIZES[device],
            "learnt from": planned.LEARNT[device], "not measured": missing,
            "rates": vars(speed),
            "others' share of the machine": {cell.name: planned.disturbed(ranks) for cell, ranks in noted.items()},
            "measured": {f"{score.cell.name}, {score.rank}": score.measured for score in found},
            "foretold": {f"{score.cell.name}, {score.rank}": score.foretold for score in found},
        },
        unit="foretold over measured, less one, in the order of config.columns",
        samples={f"{score.cell.name}, {score.rank}": list(score.wrong().values()) for score in found},
        summary=summarise(found, speed, planned.machines(facts["device"], planned.LEARNERS[device]), device),
    )  # fmt: skip
    print(record.write(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "tests" / "records")
    parser.add_argument("--only", type=int, default=-1, metavar="N", help="new runs in this call")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no new run begins")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    limits = Budget(options.only, time.monotonic() + options.seconds)
    main(options.folder, limits, "cuda" if options.gpu else "cpu")
