"""Short real trainings on made-up pictures that tell how fast this machine is: `coatnet bench step`.

Of each recipe nine runs on all devices of this machine: ZeRO 0 to 3, one and two micro-batches a step, and one with
half the micro-batch; on a processor a tenth, of one rank that has the machine to itself. Nothing is recomputed in them
and there is no pipeline, so that the planner's other figures (what is made again, bubbles) are foretold and not fitted.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from models.operations import Style
from trainer.bench import record as bench
from trainer.bench.profiling import FOLDER
from trainer.launch import free_port, launch
from trainer.machine import environment
from trainer.plan import Layout, layout
from trainer.planning import beside, fit, fitting
from trainer.planning import rates as speeds
from trainer.planning.choose import ZERO, Planner
from trainer.planning.fitting import Started, Stepped, Timed
from trainer.planning.machines import Machines
from trainer.planning.rates import Rates

STEPS = 8
WATCHED = "1:8"  # of them
LOADERS = 2  # processes for a GPU, which would wait for its batches otherwise


@dataclass(frozen=True)
class Observation:
    """What one run left.

    Attributes:
        run: as it was trained.
        ranks: of each rank the content of its profile/rank-*.json.
    """

    run: Run
    plan: Layout
    ranks: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        """For people and records."""
        parallel = self.run.parallel
        return (
            f"{self.run.model.name}-{self.run.model.resolution} zero{parallel.zero} micro{self.plan.micro_batch} "
            f"x{self.plan.accumulation}"
        )

    def waits(self, rank: int) -> list[float]:
        """Seconds of those steps in which the thread had no core: it waited for others, or another program ran."""
        return [wall - busy for wall, busy in zip(self.steps(rank, 0), self.steps(rank, 1), strict=True)]

    def steps(self, rank: int, kind: int) -> list[float]:
        """Seconds of the steps that were not traced: by the clock (0), or in which the thread had a core (1)."""
        found = self.ranks[rank]
        return [pair[kind] for number, pair in found["steps"].items() if int(number) not in found["traced"]]


def variants(run: Run, ranks: int) -> Iterator[Run]:
    """The runs to make of a recipe; `cluster.ranks` of each says on how many."""
    micro = run.parallel.micro_batch or 16
    for zero in ZERO:
        for accumulation in (1, 2):
            yield _variant(run, ranks, zero, micro, accumulation)
    if micro >= 4:
        yield _variant(run, ranks, 0, micro // 2, 1)
    if ranks > 1 and fit.kind_of(run) == "cpu":
        yield _variant(run, 1, 0, micro, 1)


def _variant(run: Run, ranks: int, zero: Literal[0, 1, 2, 3], micro: int, accumulation: int) -> Run:
    """One of them."""
    parallel = replace(
        run.parallel, zero=zero, pipeline=1, shard_group=0, offload="none", micro_batch=micro, recompute="none",
        recompute_impl="own", recompute_offload=False, trace=False,
    )  # fmt: skip
    if parallel.compile and zero == 3:
        parallel = replace(parallel, compile=False)  # DeepSpeed cannot; its hooks are measured all the same
    changed = training(replace(run, parallel=parallel), ranks, ranks * micro * accumulation, micro)
    return replace(changed, profile_trace=zero == 0 and accumulation == 1)  # the others' would show the same blocks


def training(run: Run, ranks: int, batch: int, group: int) -> Run:
    """A short training of a run's network on made-up pictures, which writes its profile and keeps nothing."""
    workers = 0 if fit.kind_of(run) == "cpu" else LOADERS
    changed = replace(
        run,
        steps=STEPS,
        profile=WATCHED,
        norm=replace(run.norm, replica_batch=group),
        data=replace(run.data, synthetic=True, mixture=(), global_batch=batch, workers=workers),
        optim=replace(run.optim, steps=10 * STEPS, warmup_steps=0, warmup_epochs=0.0),
        tracking=replace(run.tracking, mlflow=False, tensorboard=False, wandb=False, log_every=STEPS, system_every=0.0),
        evaluate=replace(run.evaluate, every=0),
        checkpoint=replace(run.checkpoint, keep_best=""),
        model=replace(run.model, drop_path_group=0),
        init=replace(run.init, path=""),
        cluster=replace(run.cluster, ranks=ranks),
    )
    resolve.check(changed)
    return changed


def observe(
    run: Run, folder: Path, module: Sequence[str] = ("trainer.train",), start: Callable[..., int] = launch
) -> Observation:
    """Train a run of `training` in `folder` and read what it wrote.

    Args:
        module: of the ranks, and its first words.
        start: starts the ranks and waits for them, as `launch` does.

    Raises:
        InputError: it failed; its logs say why.
    """
    run = replace(run, runs=str(folder.parent), name=folder.name)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(resolve.to_json(run) + "\n")
    on_cpu = fit.kind_of(run) == "cpu"
    code = start([*module, str(folder / "run.json")], run.cluster.ranks, folder / "logs", free_port(), on_cpu)
    if code:
        raise InputError(f"{folder}: the measuring run ended with {code}; see {folder / 'logs'}")
    return observed(folder)


def observed(folder: Path) -> Observation:
    """What a run of `observe` left in its folder."""
    run = resolve.recorded(folder / "run.json")
    found = [json.loads(path.read_text()) for path in sorted((folder / FOLDER).glob("rank-*.json"))]
    return Observation(run, layout(run, run.cluster.ranks), tuple(found))


def fitted(runs: Sequence[Observation], machines: Machines, start: Rates, style: Style) -> Rates:
    """The rates that explain the runs."""
    whole = [one for one in runs if len(one.ranks) == machines.devices]
    rates = _steps(whole, machines, fitting.kernels(list(_timed(whole, machines, start, style)), start), style)
    single = [one for one in runs if len(one.ranks) < machines.devices]
    return replace(rates, alone=alone(whole, single), measured=(*rates.measured, "alone")) if single else rates


def alone(whole: Sequence[Observation], single: Sequence[Observation]) -> float:
    """How much faster blocks run in a rank that has the machine to itself, the median over networks; not below 1."""

    def seconds(one: Observation) -> float:
        return mean(sum(map(sum, rank["blocks"].values())) for rank in one.ranks)

    found = []
    for one in single:
        same = [other for other in whole if other.title == one.title]
        found += [seconds(other) / seconds(one) for other in same]
    return max(1.0, median(found))


def _planner(one: Observation, machines: Machines, rates: Rates, style: Style) -> Planner:
    """The planner of one run, at these rates."""
    return Planner(one.run, one.run.data.synthetic_classes, machines, {style: rates})


def _timed(runs: Sequence[Observation], machines: Machines, rates: Rates, style: Style) -> Iterator[Timed]:
    """Every block of the runs in which nothing else happens between blocks, once for each shape and rank.

    On a GPU those of the largest micro-batch only: with less to do it waits for its host, and the time is the host's.
    """
    sizes = {(one.run.model.name, one.plan.micro_batch) for one in runs}
    largest = {name: max(size for other, size in sizes if other == name) for name, _ in sizes}
    for one in runs:
        small = not machines.device.on_host and one.plan.micro_batch < largest[one.run.model.name]
        if one.run.parallel.zero or one.plan.accumulation > 1 or small:
            continue
        blocks = _planner(one, machines, rates, style).pace.operations(style)
        for rank in one.ranks:
            for block in {block.operations: block for block in reversed(blocks)}.values():
                forward, backward = rank["blocks"][block.name]
                yield Timed(block, one.plan.micro_batch, (forward, backward))


def _steps(runs: Sequence[Observation], machines: Machines, rates: Rates, style: Style) -> Rates:
    """The rates of what lies between the blocks, from all runs, and on a GPU the host's."""
    on_cpu = machines.device.on_host
    stepped: list[Stepped] = []
    started: list[Started] = []
    kernels: dict[int, float] = {}
    for one in runs:
        run = one.run if style == "eager" else replace(one.run, parallel=replace(one.run.parallel, compile=True))
        works, terms = _planner(one, machines, rates, style).works(run, one.plan)
        assert len(works) == 1, "these runs have no pipeline"
        work, seconds = works[0], works[0].seconds
        for rank, found in enumerate(one.ranks):
            foretold, took = seconds.forward + seconds.backward, sum(map(sum, found["blocks"].values()))
            kernels[len(stepped)] = (foretold if on_cpu else took) * one.plan.accumulation
            started.append(Started(work.share.zero, foretold, took, seconds.calls, work.tensors))
            wall, busy = min(one.steps(rank, 0)), min(one.steps(rank, 1))
            # On a GPU the thread only starts what the device does, and what a step waits for is not known apart.
            waits = min(map(min, (one.waits(other) for other in range(len(one.ranks))))) if on_cpu else 0.0
            stepped.append(Stepped(work, terms, busy if on_cpu else wall, waits))
    return fitting.steps(stepped, kernels, rates if on_cpu else fitting.host(started, rates))


def foretold(one: Observation, machines: Machines, rates: Rates, style: Style) -> float:
    """What the planner says of a run's step at these rates."""
    return _planner(one, machines, rates, style).seconds(one.run.parallel, one.plan).total


@dataclass(frozen=True)
class Learnt:
    """What `learn` found.

    Attributes:
        table: the first recipe's blocks, measured and at the fitted rates.
        summary: the rates and how well they explain the runs, in lines.
    """

    rates: Rates
    record: bench.Record
    table: str
    summary: str


def learn(recipes: Sequence[Run], ranks: int, folder: Path, command: str, tell: Callable[[str], object]) -> Learnt:
    """Make the runs of all recipes, which share dtype and compilation, and fit the rates to them.

    Args:
        ranks: 0: as many as there are devices, or two on a processor.
        folder: for the runs.
        command: that measures this again.
        tell: takes a line when a run is done.

    Raises:
        InputError: a GPU that the table does not have, or a run failed.
    """
    from trainer import cluster  # torch only says which devices are here
    from trainer.planning import auto_layout  # torch only says which devices are here

    first = recipes[0]
    name = auto_layout.device_name(first)
    ranks = ranks or cluster.local_ranks(replace(first, cluster=replace(first.cluster, ranks=0)))
    machines = beside.machines_of(name, ranks, ranks)
    if machines is None:
        raise InputError(f"coatnet bench step: {name} is not in the planner's table (trainer/machine/devices.py)")
    style: Style = "compiled" if first.parallel.compile else "eager"
    made = []
    for recipe in recipes:
        for number, run in enumerate(variants(recipe, ranks)):
            made.append(observe(run, folder / f"{run.model.name}-{number}"))
            tell(f"{made[-1].title}, {run.cluster.ranks} ranks: {min(made[-1].steps(0, 0)):.3f} s a step")
    count = ranks if machines.device.on_host else 0
    start = speeds.assumed(machines.device, first.precision.dtype, style, count, first.model.attention, machines.nic)
    rates = fitted(made, machines, start, style)
    made = [one for one in made if len(one.ranks) == ranks]
    expected = {one.title: foretold(one, machines, rates, style) for one in made}
    measured = {one.title: [value for rank in range(ranks) for value in one.steps(rank, 0)] for one in made}
    off = {title: min(values) / expected[title] - 1 for title, values in measured.items()}
    whole = made[-1] if recipes[-1] is first else made[len(made) // len(recipes) - 1]
    pairs = {block: tuple(pair) for block, pair in whole.ranks[0]["blocks"].items()}
    roof = beside.blocks_at(whole.run, whole.plan, machines, rates)
    summary = {
        "explains": f"{len(made)} runs within {max(map(abs, off.values())):.0%} of their fastest step, "
                    f"{sum(map(abs, off.values())) / len(off):.1%} on the average",
        **shown(rates, machines),
    }  # fmt: skip
    record = bench.Record(
        name=f"step-{first.model.name}-{rates.name.removesuffix('.json')}",
        command=command,
        facts=environment.facts(name),
        config={"foretold": expected, "rates": vars(rates), "ranks": ranks, "recipes": [one.recipe for one in recipes]},
        unit="seconds a step",
        samples=measured,
        summary=summary,
    )
    told = "\n".join(f"{key}: {value}" for key, value in summary.items())
    return Learnt(rates, record, beside.block_table(pairs, roof), told)


def shown(rates: Rates, machines: Machines) -> dict[str, str]:
    """The rates for people."""
    found: dict[str, str] = {}
    for work, forward in rates.forward.items():
        unit, letter = (1e12, "TFLOP/s") if work in speeds.MATH else (1e9, "GB/s")
        found[work] = f"{forward / unit:.3g} forward, {rates.backward[work] / unit:.3g} backward {letter}"
    found["kernel"] = f"{rates.call * 1e6:.3g} us"
    if rates.launch:
        found["host"] = f"{rates.launch * 1e6:.3g} us for a kernel, {rates.step * 1e3:.3g} ms for a step"
        hooks = ", ".join(f"{seconds * 1e6:.3g}" for seconds in rates.hooks)
        found["DeepSpeed's hooks"] = f"{hooks} us for a weight under ZeRO-0 to -3"
    found["AdamW"] = f"{rates.update / 1e9:.3g} GB/s"
    if rates.alone > 1:
        found["one rank at work"] = f"{rates.alone:.2f}x as fast as all"
    found["between ranks"] = (
        f"{rates.wire / 1e9:.3g} GB/s and {rates.latency * 1e6:.3g} us for each of {machines.devices}"
    )
    return found
