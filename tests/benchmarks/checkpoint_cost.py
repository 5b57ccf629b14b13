"""What a save costs a training of more than 500 million parameters, beside torch.save and DeepSpeed's own; restoring.

    python tests/benchmarks/checkpoint_cost.py round FOLDER [TURNS]     about two minutes a turn; 16 GB of memory
    python tests/benchmarks/checkpoint_cost.py record FOLDER [OUT]

One process trains CoAtNet-5 with fewer blocks under ZeRO-0 on made-up pictures. A turn measures, in an order that
turns, the wall time of the same steps with a save after the first of them, until the steps are made and the save is
where its maker leaves it: ours forced to the disk and complete; the others force nothing, and what is left for the disk
is written before the next measurement begins. Before and after each of them the steps are made without a save: what a
save adds is the time beside the mean of its two neighbours, since a machine's speed drifts. It drifts by more than a
save costs, so that only the mean of many turns says something; its standard error is in the record. Checkpoints are
kept as by default, the newest three: one that replaces the only other is read back first, which costs more. Then
nothing of any file is in memory, and our checkpoint is read back into the engine; beside it its files are only read.

FOLDER keeps the rounds, so that a campaign can be broken off and continued; the record is written to tests/records.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from configs.schema import Checkpoint, Cluster, Data, Model, Norm, Optim, Parallel, Run  # noqa: E402
from models import cost, norm, spec  # noqa: E402
from trainer import cluster  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.engine import network  # noqa: E402
from trainer.engine.engine import Engine  # noqa: E402
from trainer.engine.loss import loss_function  # noqa: E402
from trainer.launch import free_port  # noqa: E402
from trainer.machine import environment  # noqa: E402
from trainer.plan import layout  # noqa: E402
from trainer.stages.pipeline import Micro  # noqa: E402
from trainer.state import checkpoint  # noqa: E402
from trainer.state.host_memory import available_bytes  # noqa: E402
from trainer.state.saver import Outcome, Saver  # noqa: E402

CLASSES, BATCH = 1000, 2
NEEDED = 16.5e9  # bytes: weights, gradients, two moments, a copy of all but the gradients, and what libraries take
STEPS = int(os.environ.get("COATNET_STEPS", "5"))  # of one measurement
TURNS = 6
RUN = Run(
    recipe="checkpoint-cost",
    model=Model(name="coatnet5", resolution=32, depths=(2, 2, 12, 19, 2)),
    norm=Norm(replica_batch=BATCH),
    data=Data(synthetic=True, global_batch=BATCH),
    optim=Optim(lr=1e-4, steps=1000, warmup_steps=0),
    parallel=Parallel(zero=0, micro_batch=BATCH, recompute="full"),
    cluster=Cluster(device="cpu", ranks=1),
)
CASES = ("ours", "torch.save", "deepspeed")


class Training:
    """An engine that makes the same kind of step over and over."""

    def __init__(self, folder: Path) -> None:
        rendezvous = {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        os.environ.update({name: str(value) for name, value in rendezvous.items()})
        self.folder, self.member = folder, cluster.join(RUN)
        plan = layout(RUN, 1)
        self.engine = Engine(network.in_layout(RUN, CLASSES, plan, self.member), RUN, plan, self.member)
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH, 3, 32, 32, generator=draw).contiguous(memory_format=torch.channels_last)
        self.targets = torch.nn.functional.one_hot(torch.arange(BATCH), CLASSES).float()
        self.loss: Callable[[Tensor, Tensor], Tensor] = loss_function("softmax")
        self.saver = Saver(folder / "ours", Checkpoint(), self.member, asynchronous=True)
        self.engine.before_change = self.saver.settle
        self.step = 0
        self.outcomes: list[Outcome] = []

    def make_step(self) -> None:
        """One update."""
        self.engine.forward_backward(iter([Micro(self.images, self.targets, None)]), self.loss)
        self.engine.update(1e-4)
        norm.commit(self.engine.model, None, torch.tensor(True))
        self.step += 1

    def timed(self, case: str) -> float:
        """Seconds of `STEPS` steps, with a save after the first of them, until that is finished."""
        os.sync()  # the disk has nothing left to write
        began = time.perf_counter()
        for number in range(STEPS):
            self.make_step()
            if number == 0:
                self.save(case)
        if case == "ours":
            self.outcomes += self.saver.finished(wait=True)
        seconds = time.perf_counter() - began
        assert all(not outcome.problem for outcome in self.outcomes), self.outcomes
        return seconds

    def save(self, case: str) -> None:
        """Save in one of the ways."""
        if case == "ours":
            state = {"step": self.step, "updates": self.engine.updates}
            parts, buffers = self.engine.fragments(owned=True), self.engine.buffers()
            self.saver.save(self.step, state, parts, buffers, last=False)
        elif case == "torch.save":
            module, optimizer = self.engine.model, self.engine._engine.optimizer
            content = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": self.step}
            torch.save(content, self.folder / "torch.pt")
        elif case == "deepspeed":
            self.engine._engine.save_checkpoint(str(self.folder / "deepspeed"), tag="save")

    def restored(self) -> dict[str, float]:
        """Seconds to read our checkpoint back into the engine with nothing of it in memory; and only to read it."""
        path = newest(self.folder)
        found: dict[str, float] = {}
        began = emptied()
        for file in path.iterdir():
            with file.open("rb", buffering=0) as stored:
                room = bytearray(8 << 20)
                while stored.readinto(room):
                    continue
        found["read"] = time.perf_counter() - began
        began = emptied()
        saved = checkpoint.newest(self.folder / "ours", self.member)
        assert saved is not None
        found["verified"] = time.perf_counter() - began
        checkpoint.restore(saved, self.engine.fragments(owned=False), self.engine.buffers())
        self.engine.restored(saved.state["updates"])
        found["restored"] = time.perf_counter() - began
        return found


def emptied() -> float:
    """Let nothing of any file be in memory; returns the time."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return time.perf_counter()


def newest(folder: Path) -> Path:
    """Our last checkpoint."""
    return max((folder / "ours").glob("step-*"))  # their numbers have leading zeros


def size(path: Path) -> int:
    """Bytes of a file or of all in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*.*"))


def one_round(folder: Path, turns: int) -> None:
    """Measure every case so many times, and the rest once, and add it to the folder."""
    if available_bytes() < NEEDED:
        sys.exit(f"{NEEDED / 1e9:.0f} GB of memory are needed, {available_bytes() / 1e9:.1f} are free")
    done = len(list(folder.glob("round-*.json")))
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    training = Training(scratch)
    training.make_step()
    training.save("ours")  # its room in memory is made once in a run
    training.make_step()
    first = training.saver.finished(wait=True)[0]
    order = [CASES[(done + turn + place) % len(CASES)] for turn in range(turns) for place in range(len(CASES))]
    seconds: list[float] = []
    plain = [training.timed("none")]
    for case in order:
        seconds.append(training.timed(case))
        plain.append(training.timed("none"))
        print(case, f"{seconds[-1]:.2f} s between {plain[-2]:.2f} and {plain[-1]:.2f}", flush=True)
    sizes = {"ours": size(newest(scratch))} | {name: size(scratch / name) for name in ("torch.pt", "deepspeed")}
    result = {
        "seconds": seconds, "plain": plain, "order": order, "first stall": first.stall,
        "stall": [outcome.stall for outcome in training.outcomes],
        "write": [outcome.write for outcome in training.outcomes], "bytes": sizes, "restore": training.restored(),
        "facts": environment.facts("cpu"),
    }  # fmt: skip
    shutil.rmtree(scratch)
    (folder / f"round-{done}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def added_in(found: dict[str, Any], case: str) -> list[float]:
    """Seconds that each save added in a round."""
    plain = found["plain"]
    return [
        seconds - statistics.mean(plain[place : place + 2])
        for place, (name, seconds) in enumerate(zip(found["order"], found["seconds"], strict=True))
        if name == case
    ]


def told(values: list[float]) -> str:
    """The mean, its standard error, the extremes."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} +- {error:.2f} s ({min(values):.1f} to {max(values):.1f})"


def write_record(folder: Path, out: Path) -> None:
    """A record of the rounds."""
    rounds: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(folder.glob("round-*.json"))]
    added = {case: [value for found in rounds for value in added_in(found, case)] for case in CASES}
    samples = {f"{case}, added": values for case, values in added.items()}
    samples["the steps alone"] = [seconds for found in rounds for seconds in found["plain"]]
    samples |= {name: [value for found in rounds for value in found[name]] for name in ("stall", "write")}
    samples |= {f"restore: {case}": [found["restore"][case] for found in rounds] for case in rounds[0]["restore"]}
    middle = {name: statistics.median(values) for name, values in samples.items()}
    parameters = cost.count(spec.of(RUN.model), RUN.model.resolution, classes=CLASSES).parameters
    means = {case: statistics.mean(values) for case, values in added.items()}
    first = statistics.median(found["first stall"] for found in rounds)
    apart = [abs(a - b) for found in rounds for a, b in pairwise(found["plain"])]
    sizes = rounds[0]["bytes"]
    rates = {name: sizes["ours"] / middle[f"restore: {name}"] / 1e9 for name in ("restored", "read")}
    summary = {
        "a save of": f"{parameters / 1e6:.0f}M parameters, AdamW",
        "added to the wall time": "; ".join(f"{case} {told(values)}" for case, values in added.items()),
        "ours over DeepSpeed's": f"{means['ours'] / means['deepspeed']:.2f}x, of the means of {len(added['ours'])}",
        "noise": f"the steps alone, one save apart: {statistics.median(apart):.1f} s (to {max(apart):.1f})",
        "training stood still": f"{middle['stall']:.2f} s, in a run's first save {first:.2f} s",
        "bytes": ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in sizes.items()),
        "verified and restored": f"{rates['restored']:.2f} GB/s; the disk gives {rates['read']:.2f} GB/s",
    }
    record = bench.Record(
        name="checkpoint-cost",
        command=f"python tests/benchmarks/checkpoint_cost.py round FOLDER {TURNS}; then record FOLDER",
        facts=rounds[-1]["facts"],
        config={
            "steps": STEPS,
            "rounds": len(rounds),
            "model": "coatnet5 at 32 px, depths 2 2 12 19 2, ZeRO-0, one rank",
        },
        unit="seconds",
        samples=samples,
        summary=summary,
    )
    print(record.write(out))


if __name__ == "__main__":
    if sys.argv[1] == "round":
        one_round(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else TURNS)
    else:
        write_record(Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else ROOT / "tests" / "records")
