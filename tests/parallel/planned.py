"""The planner beside the real trainer on this machine: which layouts, how they are run, how they score.

Rates are learnt from short runs of some networks without recomputation or pipeline (`trainer.bench.step`); what is
scored are other networks and other layouts, each a real run of `trainer.train` (`planned_rank`), of two ranks or more
on a processor, of one on a GPU. Four figures of every rank: bytes of its states, bytes of activations saved at the
beginning of a backward pass, its size at most beside that after imports (on a GPU what torch's allocator took), and
seconds of a step. Of seconds the fastest step counts: other programs only add.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from configs import resolve
from configs.schema import Run
from models.activations import Device, Recompute
from trainer.bench import step as bench_step
from trainer.bench.step import Observation
from trainer.launch import free_port, launch
from trainer.plan import layout
from trainer.planning import beside, fit, rates
from trainer.planning.choose import Planner
from trainer.planning.machines import Machines
from trainer.planning.rates import Rates

Start = Callable[..., int]  # as `trainer.launch.launch`

CLASSES = 1000
# What may be wrong, as a share.
BOUNDS = {"states": 0.02, "saved": 0.05, "peak": 0.10, "seconds": 0.25}
SIZES: dict[Device, dict[str, tuple[int, int]]] = {  # resolution, micro-batch
    "cpu": {
        "coatnet-nano": (64, 16),
        "coatnet0": (160, 4),
        "coatnet1": (160, 4),
        "coatnet2": (160, 4),
        "coatnet3": (128, 4),
    },
    "cuda": {
        "coatnet0": (224, 128),
        "coatnet2": (224, 64),
        "coatnet3": (224, 64),
        "coatnet4": (224, 32),
        "coatnet5": (224, 32),
        "coatnet6": (224, 16),
        "coatnet7": (224, 16),
    },
}
# Networks that the rates are learnt from, and ranks that learn.
LEARNT: dict[Device, tuple[str, ...]] = {
    "cpu": ("coatnet-nano", "coatnet0", "coatnet1"),
    "cuda": ("coatnet0", "coatnet3"),
}
LEARNERS: dict[Device, int] = {"cpu": 2, "cuda": 1}


@dataclass(frozen=True)
class Cell:
    """One layout of one network, in bf16."""

    model: str
    zero: Literal[0, 1, 2, 3]
    recompute: Recompute
    pipeline: int = 1
    world: int = 2
    device: Device = "cpu"

    @property
    def name(self) -> str:
        """Of its folder, and in reports."""
        return (
            f"{self.model}-pipeline{self.pipeline}-data{self.world // self.pipeline}-zero{self.zero}-{self.recompute}"
        )

    @property
    def timed(self) -> bool:
        """Whether its seconds mean anything: each rank has a core."""
        return self.device == "cuda" or self.world <= len(os.sched_getaffinity(0))

    @property
    def run(self) -> Run:
        """Its training: two micro-batches a step, with a pipeline four."""
        _, micro = SIZES[self.device][self.model]
        found = recipe(self.model, self.device)
        parallel = replace(found.parallel, zero=self.zero, recompute=self.recompute, pipeline=self.pipeline)
        batch = self.world // self.pipeline * micro * (2 if self.pipeline == 1 else 4)
        short = bench_step.training(replace(found, parallel=parallel), self.world, batch, micro)
        return replace(short, profile="", steps=6, tracking=replace(short.tracking, log_every=100))


def recipe(model: str, device: Device) -> Run:
    """A training of a network at the size that it has here."""
    resolution, micro = SIZES[device][model]
    run = resolve.load("coatnet0-in1k-224")
    return replace(
        run,
        model=replace(run.model, name=model, resolution=resolution, drop_path=0.0),
        augment=replace(run.augment, mixup_alpha=0.0),
        parallel=replace(run.parallel, micro_batch=micro),
        cluster=replace(run.cluster, device=device),
    )


def cells(device: Device = "cpu") -> list[Cell]:
    """All of them: ZeRO 0 to 3, recomputation three ways, one and two stages, CoAtNet-0 to -3; on one GPU to -7."""
    if device == "cuda":
        single: list[tuple[str, Literal[0, 1, 2, 3], Recompute]] = [
            ("coatnet0", 0, "full"), ("coatnet2", 0, "none"), ("coatnet2", 1, "selective"),
            ("coatnet2", 3, "full"), ("coatnet3", 1, "none"), ("coatnet3", 2, "selective"),
            ("coatnet4", 0, "none"), ("coatnet4", 3, "selective"), ("coatnet5", 0, "selective"),
            ("coatnet5", 1, "full"), ("coatnet6", 0, "selective"), ("coatnet7", 0, "full"),
        ]  # fmt: skip
        return [Cell(model, zero, kind, world=1, device="cuda") for model, zero, kind in single]
    zeros: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    kinds: tuple[Recompute, ...] = ("none", "selective", "full")
    found = [Cell("coatnet0", zero, kind) for zero in zeros for kind in kinds]
    staged: list[tuple[Literal[0, 1, 2, 3], Recompute]] = [
        (0, "none"), (0, "full"), (1, "none"), (1, "selective"), (2, "selective"), (2, "full"), (3, "full"),
    ]  # fmt: skip
    found += [Cell("coatnet1", zero, kind, 2) for zero, kind in staged]
    plain: list[tuple[Literal[0, 1, 2, 3], Recompute]] = [
        (0, "none"), (1, "selective"), (2, "full"), (3, "none"), (3, "full"),
    ]  # fmt: skip
    found += [Cell("coatnet2", zero, kind) for zero, kind in plain]
    found += [Cell("coatnet2", 1, "none", 2), Cell("coatnet2", 3, "full", 2)]
    large: list[tuple[Literal[0, 1, 2, 3], Recompute]] = [(0, "none"), (1, "none"), (2, "selective"), (3, "full")]
    found += [Cell("coatnet3", zero, kind) for zero, kind in large]
    found += [Cell("coatnet3", 0, "full", 2), Cell("coatnet3", 3, "full", 2)]
    # Two stages of two replicas: states and memory only, since four ranks share two cores.
    return found + [Cell("coatnet0", zero, "full", 2, 4) for zero in (1, 2, 3)]


def learn(folder: Path, device: Device = "cpu", start: Start = launch) -> list[Observation]:
    """The runs behind the rates; those that are there already are read.

    Args:
        start: starts the ranks of a run.
    """
    found = []
    for model in LEARNT[device]:
        for number, run in enumerate(bench_step.variants(recipe(model, device), LEARNERS[device])):
            place = folder / f"learn-{model}-{number}"
            if not (place / "profile" / f"rank-{run.cluster.ranks - 1:05d}.json").exists():
                bench_step.observe(run, place, start=start)
                print(place.name, flush=True)
            found.append(bench_step.observed(place))
    return found


def machines(name: str, world: int) -> Machines:
    """A machine as the planner knows it.

    Args:
        name: what its devices call themselves, or "cpu".

    Raises:
        RuntimeError: a GPU that is not in the planner's table.
    """
    found = beside.machines_of(name, world, world)
    if found is None:
        raise RuntimeError(f"{name} is not in the planner's table")
    return found


def assumed(name: str = "cpu") -> Rates:
    """What is assumed of a machine's devices."""
    here = machines(name, LEARNERS["cpu" if name == "cpu" else "cuda"])
    return rates.assumed(here.device, "bf16", "eager", here.devices if here.device.on_host else 0, "auto", here.nic)


def rates_from(observed: Sequence[Observation], name: str = "cpu") -> Rates:
    """The rates of the machine that made these runs."""
    return bench_step.fitted(observed, machines(name, len(observed[0].ranks)), assumed(name), "eager")


def measure(cell: Cell, folder: Path, start: Start = launch) -> list[dict[str, Any]]:
    """What each rank of a cell noted; read where it is there already.

    Args:
        start: starts the ranks of a run.

    Raises:
        RuntimeError: the run failed; its logs are in the folder.
    """
    place = folder / cell.name
    files = [place / f"planned-rank-{rank:05d}.json" for rank in range(cell.world)]
    if not all(file.exists() for file in files):
        run = replace(cell.run, runs=str(folder), name=cell.name)
        place.mkdir(parents=True, exist_ok=True)
        (place / "run.json").write_text(resolve.to_json(run) + "\n")
        words = ["tests.parallel.planned_rank", str(place / "run.json")]
        code = start(words, cell.world, place / "logs", free_port(), cell.device == "cpu")
        if code:
            raise RuntimeError(f"{cell.name} ended with {code}; see {place / 'logs'}")
        print(cell.name, flush=True)
    return [json.loads(file.read_text()) for file in files]


@dataclass(frozen=True)
class Score:
    """Foretold and measured of one rank; seconds of its run."""

    cell: Cell
    rank: int
    foretold: dict[str, float]
    measured: dict[str, float]

    def wrong(self) -> dict[str, float]:
        """Foretold over measured, less one."""
        return {name: self.foretold[name] / value - 1 for name, value in self.measured.items()}

    def broken(self) -> list[str]:
        """The bounds that are not kept."""
        return [name for name, share in self.wrong().items() if abs(share) > BOUNDS[name]]


def scores(cell: Cell, ranks: Sequence[dict[str, Any]], speed: Rates, name: str = "cpu") -> Iterator[Score]:
    """One for each rank of a run on the machine of this name."""
    run, plan = cell.run, layout(cell.run, cell.world)
    planner = Planner(run, CLASSES, machines(name, cell.world), {"eager": speed})
    seconds = planner.seconds(run.parallel, plan).total
    fastest = min(step["wall"] for step in ranks[0]["steps"][1:])
    for rank in ranks:
        need = fit.estimate(run, plan, CLASSES, rank["stage"])
        whole = rank["peaks"]["whole"] if cell.zero == 3 and plan.replicas > 1 else 0
        measured = {
            "states": float(rank["states"] + rank["gradients"]),
            "saved": float(rank["peaks"]["activations"] + whole),
            "peak": float(max(size["most"] for size in rank["sizes"]) - rank["base"]["now"]),
        }
        inside = planner.anatomy.inside(run, plan, rank["stage"])
        foretold = {
            "states": float(need.states),
            "saved": float(need.activations + need.gathered - inside),  # before a block is made again
            "peak": float(need.total - need.libraries),
        }
        if cell.timed:
            measured["seconds"], foretold["seconds"] = fastest, seconds
        yield Score(cell, rank["rank"], foretold, measured)


def disturbed(ranks: Sequence[dict[str, Any]]) -> float:
    """Share of the machine that other programs had in the fastest step, on the average over its ranks."""
    fastest = min(ranks[0]["steps"][1:], key=lambda step: step["wall"])
    own = sum(median(step["process"] for step in rank["steps"][1:]) for rank in ranks)
    return max(0.0, float(fastest["machine"] + fastest["stolen"] - own) / float(fastest["wall"]) / 2)
