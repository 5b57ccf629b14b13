"""The trainer's own overhead: its loop against a bare loop over the same DeepSpeed engine, alternated in one run.

    python tests/benchmarks/overhead.py [--ranks N] [--rounds N] [--steps N] [--case NAME ...] [--out FOLDER]

trainer: `trainer.train.loop` as it is, with the synthetic stream, normalisation, targets, schedule, meter, agreement
on stopping, and a log line to the run folder every ten steps. bare: forward, backward and DeepSpeed's step on one
prepared batch, and BatchNorm's commit, which belongs to the mathematics. The process that carries lines to MLflow is
not running: it would slow both sides alike. Ranks are real processes; one per GPU, or two with gloo on a CPU.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from configs import resolve  # noqa: E402
from configs.schema import Augment, Cluster, Data, Model, Norm, Optim, Parallel, Precision, Run, Tracking  # noqa: E402
from data_pipeline import augment  # noqa: E402
from data_pipeline.stream import train_loader  # noqa: E402
from models import norm  # noqa: E402
from trainer import cluster  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.engine.loss import loss_function  # noqa: E402
from trainer.engine.recompute import run_block  # noqa: E402
from trainer.health import goodput, pulse  # noqa: E402
from trainer.health.stopping import StopFlag  # noqa: E402
from trainer.launch import free_port, launch  # noqa: E402
from trainer.machine import environment  # noqa: E402
from trainer.session import Session  # noqa: E402
from trainer.train import loop, prepare  # noqa: E402

# name: (model, pixels, images per rank and step on a CPU, on a GPU); a CPU step then takes a second or so
CASES = {"coatnet0": ("coatnet0", 96, 12, 128), "nano": ("coatnet-nano", 64, 96, 512)}
LIMIT = 0.03  # of the step time: issue A2


def run_of(case: str, ranks: int, device: str, folder: str) -> Run:
    """The run of a case: ZeRO-3 with full recomputation, as the recipes ship."""
    model, pixels, on_cpu, on_gpu = CASES[case]
    share = on_cpu if device == "cpu" else on_gpu
    return Run(
        recipe="overhead",
        name=case,
        runs=folder,
        model=Model(name=model, resolution=pixels if device == "cpu" else 224),
        norm=Norm(replica_batch=share),
        data=Data(synthetic=True, global_batch=ranks * share, workers=0 if device == "cpu" else 4),
        augment=Augment(crop="resize"),
        optim=Optim(steps=100_000, lr=1e-4, warmup_steps=100),
        parallel=Parallel(zero=3, recompute="full"),
        precision=Precision(dtype="fp32" if device == "cpu" else "bf16"),
        tracking=Tracking(mlflow=False, log_every=10),
        cluster=Cluster(device="cpu" if device == "cpu" else "cuda", ranks=ranks),
    )


def timed(steps: int, work: Callable[[], None]) -> Callable[[], float]:
    """Seconds per step of `work`, which makes `steps` steps, from when all ranks begin until all are done."""

    def measure() -> float:
        settle()
        began = time.perf_counter()
        work()
        settle()
        return (time.perf_counter() - began) / steps

    return measure


def settle() -> None:
    """Wait for the device and for the other ranks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def trainer_steps(session: Session, steps: int) -> Callable[[], None]:
    """The trainer's loop, `steps` steps further."""
    stop = StopFlag()

    def work() -> None:
        session.end = session.step + steps
        if loop(session, stop) != 0:
            raise RuntimeError("the run diverged or was stopped; nothing can be compared")

    return work


def bare_steps(session: Session, steps: int) -> Callable[[], None]:
    """The same engine's forward, backward and step on a fixed batch, as a plain script would call them."""
    run, engine, device = session.run, session.engine, session.member.device
    slices = engine.layout.slices(session.member.rank)
    batch = next(train_loader(session.dataset, run, session.order, slices, 0, 1)).to(device)
    images = augment.prepare(batch, run.augment, torch.float32, run.precision.channels_last)
    wanted = augment.targets(batch, session.dataset.classes, run.optim.label_smoothing, run.optim.loss)
    deepspeed: Any = engine._engine
    loss_of, blocks = loss_function(run.optim.loss), run_block(run.parallel.recompute)

    def work() -> None:
        deepspeed.train()
        for _ in range(steps):
            loss = loss_of(deepspeed(images, drop_SB=None, run=blocks).float(), wanted)
            deepspeed.backward(loss)
            deepspeed.step()
            norm.commit(engine.model)

    return work


def as_rank(run_file: str, rounds: int, steps: int, out: str) -> None:
    """One rank: warm both sides up, measure them in turn, and let the first rank write the seconds per step."""
    run = resolve.from_json(Path(run_file).read_text())
    local_rank = cluster.local_rank()
    member = cluster.join(run)
    attempt = goodput.attempt(Path(run.folder), member.world, member.first)
    with attempt as clock, pulse.beating(clock, member, local_rank) as beats:
        session = prepare(run, member, clock, beats)
        assert session.engine.layout.accumulation == 1, "the bare loop makes one pass a step"
        sides = {
            "trainer": timed(steps, trainer_steps(session, steps)),
            "bare": timed(steps, bare_steps(session, steps)),
        }
        bench.alternate(sides, 1)
        samples = bench.alternate(sides, rounds)
        if member.first:
            Path(out).write_text(json.dumps({"device": member.device_name, "samples": samples}))
        session.line.close()
        cluster.leave()


def measure(case: str, ranks: int, rounds: int, steps: int) -> tuple[Run, dict[str, Any]]:
    """Start the ranks of a case; the run, and what its first rank wrote."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the ranks run this file as a module, by its bare name
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(case, ranks or (torch.cuda.device_count() if device == "cuda" else 2), device, folder)
        run_file, out = Path(folder) / "run.json", Path(folder) / "samples.json"
        run_file.write_text(resolve.to_json(run))
        words = ["overhead", "--rank", str(run_file), str(out), "--rounds", str(rounds), "--steps", str(steps)]
        logs = Path(folder) / "logs"
        if launch(words, run.cluster.ranks, logs, free_port(), device == "cpu"):
            raise RuntimeError((logs / "rank-00000.log").read_text())
        found: dict[str, Any] = json.loads(out.read_text())
    return run, found


def main() -> None:
    """Measure every case and write the record."""
    parser = argparse.ArgumentParser(description="the trainer's overhead over a bare DeepSpeed loop")
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: one per GPU, or two on a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each side in a round")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "records", help="folder of the record")
    parser.add_argument("--rank", nargs=2, metavar=("RUN", "OUT"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.rank:
        as_rank(words.rank[0], words.rounds, words.steps, words.rank[1])
        return
    samples: dict[str, list[float]] = {}
    summary: dict[str, str] = {}
    config: dict[str, Any] = {}
    for case in words.case:
        run, found = measure(case, words.ranks, words.rounds, words.steps)
        both = found["samples"]
        samples |= {f"{case} {side}": values for side, values in both.items()}
        config[case] = resolve.flat(run)
        ratios = sorted(a / b - 1 for a, b in zip(both["trainer"], both["bare"], strict=True))
        median = bench.median_ratio(both["trainer"], both["bare"]) - 1
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        summary[case] = (
            f"{median:+.1%} of a {statistics.median(both['bare']):.2f} s step ({low:+.1%} to {high:+.1%}, the middle "
            f"half of {len(ratios)} rounds; limit {LIMIT:.0%})"
        )
        print(f"{case}: {summary[case]}")
    record = bench.Record(
        name="trainer-overhead",
        command=" ".join(["python tests/benchmarks/overhead.py", *sys.argv[1:]]),
        facts=environment.facts(found["device"]),
        config=config,
        unit="seconds per step, a mean over a round",
        samples=samples,
        summary=summary,
    )
    print(record.write(words.out))


if __name__ == "__main__":
    main()
