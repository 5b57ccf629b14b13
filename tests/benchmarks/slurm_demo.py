"""The demo on a SLURM cluster, as a pipeline of two stages under ZeRO-3 on 2 nodes x 2 ranks; writes the record.

python -m tests.benchmarks.slurm_demo

As root; it starts the test cluster and ends it. The run is preempted twice and loses a node once, and must reach what
`coatnet train demo-digits` reaches in one piece on one machine (record `demo-digits`).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from configs import resolve
from data_pipeline.building import demo
from tests.slurm import lab as laboratory
from tests.slurm.lab import Lab
from tests.slurm.runs import Tiny
from trainer.bench import record as bench
from trainer.machine import environment

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "runs" / "benchmarks" / "slurm-demo"
BLOWS = {120: "preempted", 280: "node cut", 440: "preempted"}  # after so many steps
WORDS = ("--parallel.pipeline", "2", "--parallel.zero", "3")


class Demo(Tiny):
    """The demo as it is, on two nodes."""

    def settings(self) -> dict[str, object]:
        """What a user gives."""
        return {"data.path": self.digits, "runs": self.folder.parent, "name": self.folder.name}


def blow(run: Tiny, what: str) -> dict[str, object]:
    """Let something happen, and wait until the run makes steps again."""
    before, made = len(run.events("try")), max(run.losses())
    if what == "preempted":
        struck = run.preempt()
    else:
        node = run.events("try")[-1]["nodes"][1]
        run.lab.node("kill", node)
        struck = time.time()
    run.lab.until(lambda: len(run.events("try")) > before, "another try", run.failed, hurry=True)
    begun = run.events("try")[-1]["time"]
    run.until_step(made + 1, begun)
    again = next(row for row in run.rows() if row["time"] > begun)
    return {"what": what, "at": made, "seconds": again["time"] - struck}


def train(lab: Lab) -> tuple[Tiny, list[dict[str, object]], float]:
    """The whole run: itself, what happened to it, its seconds."""
    digits = FOLDER / "digits"
    if not digits.exists():
        demo.digits(digits)
    run = Demo(lab, FOLDER / f"run-{int(time.time())}", digits, steps=700, per_node=2, words=WORDS)
    began = time.time()
    run.submit(run.profile())
    happened = []
    for step, what in BLOWS.items():
        run.until_step(step)
        happened.append(blow(run, what))
        print(happened[-1], flush=True)
    run.until_done()
    return run, happened, time.time() - began


def main() -> None:
    """Start the cluster, train, write the record."""
    if os.environ.get("LAB", "") == "":
        cluster = str(ROOT / "tests" / "slurm" / "cluster" / "with.sh")
        sys.exit(
            subprocess.run(
                [cluster, "--install", sys.executable, "-m", "tests.benchmarks.slurm_demo"], cwd=ROOT
            ).returncode
        )
    run, happened, seconds = train(laboratory.start())
    score = json.loads((run.folder / "evaluation.json").read_text())["eval/top1"]
    alone = bench.read(ROOT / "tests" / "records" / "demo-digits.json").samples["top-1"]
    assert min(alone) - 0.003 <= score, f"{score:.2%}, in one piece at least {min(alone):.2%}"
    record = bench.Record(
        name="slurm-demo",
        command="python -m tests.benchmarks.slurm_demo",
        facts=environment.facts("cpu"),
        config={**resolve.flat(resolve.recorded(run.folder / "run.json")), "data.path": "digits", "runs": "runs"},
        unit="share; seconds from each blow to the next step",
        samples={
            "top-1": [score],
            **{f"{row['what']} at {row['at']}": [float(str(row["seconds"]))] for row in happened},
        },
        summary={
            "2 nodes x 2 ranks, pipeline 2 x ZeRO-3": f"held-out top-1 {score:.2%} in {seconds:.0f} s",
            "preempted twice, a node cut": "; ".join(f"{row['what']} at step {row['at']}" for row in happened),
            "in one piece on one machine": f"{min(alone):.2%} to {max(alone):.2%} (3 seeds)",
        },
    )
    print(record.write(ROOT / "tests" / "records"))


if __name__ == "__main__":
    main()
