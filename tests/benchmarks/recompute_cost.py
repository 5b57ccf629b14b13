"""What recomputation costs: steps with it against steps without, alternated in one run.

    python tests/benchmarks/recompute_cost.py [--rounds N] [--steps N] [--case NAME] [--out FOLDER]

Two ranks with gloo on a CPU, one thread each, hold every engine of SIDES side by side and make some steps of each in
turn; the time of a step is the CPU time of both ranks together, since one that waits for the other costs nothing.
Blocks: ZeRO-1 on two replicas. Stages: a pipeline of two, which under ZeRO-1 keeps its activations and under ZeRO-2
makes the first stage again.

The model: a forward pass is a third of a step, so that making all of it again costs a third more, and making a stage
again a third of its share. What a step does beside its passes (AdamW, communication) makes the ratio smaller.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from configs import resolve  # noqa: E402
from configs.schema import Cluster, Data, Model, Norm, Optim, Parallel, Precision, Run  # noqa: E402
from models import norm  # noqa: E402
from trainer import cluster  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.cluster import Member  # noqa: E402
from trainer.engine import network  # noqa: E402
from trainer.engine.engine import Engine  # noqa: E402
from trainer.engine.loss import loss_function  # noqa: E402
from trainer.launch import free_port, launch  # noqa: E402
from trainer.machine import environment  # noqa: E402
from trainer.plan import layout  # noqa: E402
from trainer.stages import partition  # noqa: E402
from trainer.stages.pipeline import Micro  # noqa: E402

CLASSES = 1000
CASES = {"coatnet0": ("coatnet0", 96), "nano": ("coatnet-nano", 64)}  # model, pixels
# name: settings of `parallel`
SIDES: dict[str, dict[str, Any]] = {
    "blocks kept": {"zero": 1, "recompute": "none"},
    "blocks selective": {"zero": 1, "recompute": "selective"},
    "blocks made again": {"zero": 1, "recompute": "full"},
    "stages kept": {"zero": 1, "recompute": "none", "pipeline": 2},
    "stages made again": {"zero": 2, "recompute": "full", "pipeline": 2},
}
PAIRS = {"blocks selective": "blocks kept", "blocks made again": "blocks kept", "stages made again": "stages kept"}
FORWARD = 1 / 3  # of a step


def run_of(case: str, side: str) -> Run:
    """The run of a case and a side; all sides cut into the same stages."""
    model, pixels = CASES[case]
    return Run(
        recipe="recompute-cost",
        model=Model(name=model, resolution=pixels),
        norm=Norm(replica_batch=4),
        data=Data(synthetic=True, global_batch=16, synthetic_classes=CLASSES),
        optim=Optim(steps=100_000, lr=1e-4, warmup_steps=100),
        parallel=Parallel(micro_batch=4, balance="activations", **SIDES[side]),
        precision=Precision(dtype="fp32"),
        cluster=Cluster(device="cpu", ranks=2),
    )


def at_most(case: str, side: str) -> float:
    """The model's ratio of the step of a side to the step of what it is compared with."""
    run = run_of(case, side)
    if not partition.remakes(run):
        return 1 + FORWARD
    costs = partition.block_costs(replace(run, parallel=replace(run.parallel, balance="compute")), CLASSES, 4)
    again = partition.stages(run, CLASSES, 4)[-1].first  # the last stage makes nothing again
    return 1 + FORWARD * sum(costs[:again]) / sum(costs)


def steps_of(run: Run, base: Member, steps: int) -> Callable[[], float]:
    """A function that makes `steps` steps of the run and gives the CPU seconds of one, of all ranks together."""
    member = cluster.in_mesh(base, run.parallel.pipeline, timedelta(seconds=run.cluster.timeout))
    plan = layout(run, member.world)
    engine = Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
    loss_of = loss_function(run.optim.loss)
    draw, side = torch.Generator().manual_seed(member.replica), run.model.resolution
    images = torch.randn(plan.micro_batch, 3, side, side, generator=draw).to(memory_format=torch.channels_last)
    wanted = torch.full((plan.micro_batch, CLASSES), 1 / CLASSES)

    def micros() -> Iterator[Micro]:
        for _ in range(plan.accumulation):
            yield Micro(images if member.begins else None, wanted if member.ends else None, None)

    def work() -> float:
        dist.barrier()
        began = time.process_time()
        for _ in range(steps):
            engine.forward_backward(micros(), loss_of)
            engine.update(1e-4)
            norm.commit(engine.model, member.data_group)
        seconds = torch.tensor(time.process_time() - began, dtype=torch.float64)
        dist.all_reduce(seconds)
        return float(seconds) / steps

    return work


def as_rank(case: str, rounds: int, steps: int, out: str) -> None:
    """One rank: make all engines, warm them up, measure them in turn; the first rank writes the seconds."""
    torch.set_num_threads(1)
    base = cluster.join(run_of(case, "blocks kept"))
    sides = {side: steps_of(run_of(case, side), base, steps) for side in SIDES}
    bench.alternate(sides, 1)
    samples = bench.alternate(sides, rounds)
    if base.first:
        Path(out).write_text(json.dumps(samples))
    cluster.leave()


def measure(case: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Start the ranks of a case; the seconds of each side, round by round."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the ranks run this file as a module, by its bare name
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        out, logs = Path(folder) / "samples.json", Path(folder) / "logs"
        words = ["recompute_cost", "--rank", str(out), "--case", case, "--rounds", str(rounds), "--steps", str(steps)]
        if launch(words, 2, logs, free_port(), True):
            raise RuntimeError((logs / "rank-00000.log").read_text())
        found: dict[str, list[float]] = json.loads(out.read_text())
    return found


def summarise(case: str, samples: dict[str, list[float]]) -> dict[str, str]:
    """Each side's step over that of what it is compared with, beside the model."""
    summary = {}
    for side, plain in PAIRS.items():
        ratios = sorted(a / b for a, b in zip(samples[side], samples[plain], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        summary[side] = (
            f"{statistics.median(ratios):.2f}x the step of {plain} ({low:.2f} to {high:.2f}, the middle half of "
            f"{len(ratios)} rounds); the model: at most {at_most(case, side):.2f}x"
        )
    return summary


def main() -> None:
    """Measure a case and write the record."""
    parser = argparse.ArgumentParser(description="the cost of recomputation, by blocks and by stages")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of each side in a round")
    parser.add_argument("--case", choices=CASES, default="coatnet0")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "records", help="folder of the record")
    parser.add_argument("--rank", metavar="OUT", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.rank:
        as_rank(words.case, words.rounds, words.steps, words.rank)
        return
    samples = measure(words.case, words.rounds, words.steps)
    summary = summarise(words.case, samples)
    record = bench.Record(
        name="recompute-cost",
        command=" ".join(["python tests/benchmarks/recompute_cost.py", *sys.argv[1:]]),
        facts=environment.facts("cpu"),
        config={side: resolve.flat(run_of(words.case, side)) for side in SIDES},
        unit="CPU seconds of a step, both ranks together, a mean over the steps of a round",
        samples=samples,
        summary=summary,
    )
    for side, text in summary.items():
        print(f"{side}: {text}")
    print(record.write(words.out))


if __name__ == "__main__":
    main()
