"""`coatnet train` and `coatnet eval`: everything is checked here, then ranks are started."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from trainer.track import PATIENCE, check_sinks, run_folder, tracking_uri

if TYPE_CHECKING:
    from data_pipeline.manifest import Dataset
    from trainer.fit import Memory
    from trainer.plan import Layout

# Fields that a run may change between two starts in the same folder: none of them touches the mathematics.
FREE = (
    "name",
    "runs",
    "steps",
    "data.path",
    "data.mixture",
    "data.workers",
    "data.cache",
    "data.cache_bytes",
    "data.fetch_retries",
    "data.on_damage",
    "data.damage_budget",
    "data.pipe",
    "parallel.",
    "checkpoint.",
    "evaluate.",
    "tracking.",
    "cluster.",
)

LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TRAIN_USAGE = """usage: coatnet train RECIPE [--dry-run] [--field value ...]

Trains RECIPE (see `coatnet config list`) on all devices of this machine, or as one rank where an outside launcher has
set RANK. The run lives in runs/NAME; the same command continues it from its newest verified checkpoint, Ctrl-C saves
and exits with 75. Fields and their defaults: `coatnet config show RECIPE`.

--dry-run                    print what would run (configuration, layout, DeepSpeed's JSON, parameter groups, schedule,
                             counts, data, memory) and start nothing
--init.path RUN_OR_FILE      start from the weights of another run's newest checkpoint, or of a file of `coatnet
                             export`, at any resolution; --init.weights raw|ema chooses, --init.head reset takes other
                             classes. A run that has a checkpoint of its own continues that instead
--data.synthetic --steps 50  made-up pictures at the recipe's true size: does it fit, how fast is it

exit codes: 0 done, 75 stopped on request and saved, 76 configuration or data error, 77 diverged, 130 stopped before
the first step, else a crash"""

EVAL_USAGE = """usage: coatnet eval RUN [--json]

Scores the newest verified checkpoint of the run folder RUN on the held-out split, on all devices of this machine."""


def train_command(arguments: list[str]) -> int:
    """`coatnet train RECIPE [overrides]`: returns the exit code."""
    from trainer.cli_config import resolve_command

    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(TRAIN_USAGE + "\n")
        return 0
    dry = "--dry-run" in arguments
    arguments = [word for word in arguments if word != "--dry-run"]
    if not arguments:
        raise InputError("coatnet train --dry-run: the recipe is missing; `coatnet config list` has them")
    run = resolve_command(arguments[0], arguments[1:])
    if "RANK" in os.environ and not dry:
        _as_rank(run)
    from trainer import cluster
    from trainer.launch import INTERRUPTED, free_port, launch

    world = cluster.local_ranks(run)
    facts = check_before_start(run, world)
    if dry:
        from trainer.dry_run import describe

        print(describe(run, *facts))
        return 0
    folder = run_folder(run)
    with _claimed(folder, run):
        if (folder / "done").exists():
            print(f"{folder} is finished; `coatnet eval {folder}` scores it, --name starts another run")
            _where(run, folder)
            return 0
        port = free_port(run.cluster.master_port)
        on_cpu = cluster.device_kind(run) == "cpu"
        patience = run.cluster.timeout + PATIENCE
        code = launch(["trainer.train", str(folder / "run.json")], world, folder / "logs", port, on_cpu, patience)
        if code == INTERRUPTED:
            sys.stderr.write("stopped before the first step; nothing to save\n")
        if code not in (0, 75, 76, 77):
            saved = sorted(path.parent.name for path in folder.glob("checkpoints/step-*/COMPLETE"))
            last = f"the last save is {saved[-1]}" if saved else "nothing was saved yet"
            sys.stderr.write(f"{last}; the same command continues\n")
    _where(run, folder)
    return code


def check_before_start(run: Run, world: int, outside: bool = False) -> "tuple[Dataset, Layout, Memory, int]":
    """Refuse before anything starts what would fail later: data, model, batch, devices, memory, port.

    Args:
        outside: whether an outside launcher started the ranks: `world` may then span machines, and it has the port.

    Returns:
        The data set, the layout, the memory of a rank as estimated, and what a rank has.

    Raises:
        InputError: what is wrong, where, and what would do.
    """
    from data_pipeline.augment import check_mixing
    from data_pipeline.stream import open_data
    from models import drop_path, spec
    from trainer import cluster, deepspeed_shims, fit, warm_start
    from trainer.launch import free_port
    from trainer.plan import layout

    spec.of(run.model)
    resolve.check(run)
    plan = layout(run, world)
    check_mixing(run.augment, plan.slices(0))  # micro-batches are of one size: the first rank's speak for all
    drop_path.check_groups(run.model.drop_path_group if run.model.drop_path else 0, plan.slices(0))
    if run.model.attention == "flex" and cluster.device_kind(run) == "cpu":
        raise InputError("model.attention = 'flex': torch trains it on CUDA only; nearest valid: explicit")
    check_sinks(run)
    if not outside:
        free_port(run.cluster.master_port)
    local = cluster.local_world() if outside else world
    _check_devices(run, local, outside)
    deepspeed_shims.check_version()
    dataset = open_data(run)
    dataset.split("heldout")  # scored at the end, where its absence would come too late
    split = dataset.split("train")
    if split.samples < run.data.global_batch:
        raise InputError(
            f"data.global_batch = {run.data.global_batch}: the training split of {dataset.root} has "
            f"{split.samples} samples; nearest valid: {split.samples}"
        )
    warmup, steps = resolve.warmup(run, split.samples), resolve.total_steps(run, split.samples)
    if warmup >= steps:
        raise InputError(f"optim.warmup_steps = {warmup}: the run has only {steps} steps; nearest valid: {steps - 1}")
    warm_start.check(run, dataset, verified=not outside)
    available = cluster.available_bytes(run, local)
    return dataset, plan, fit.require_fit(run, plan, dataset.classes, available), available


def _check_devices(run: Run, ranks: int, outside: bool) -> None:
    """Refuse more ranks on this machine than it has GPUs, but for a launcher that binds each rank to one of its own."""
    from trainer import cluster

    if cluster.device_kind(run) != "cuda":
        return
    import torch

    have = torch.cuda.device_count()
    if outside and ranks > have != 1:
        raise InputError(f"{ranks} ranks were started on this machine, which has {have} GPUs; nearest valid: {have}")
    if not outside and ranks > have:
        raise InputError(f"cluster.ranks = {ranks}: this machine has {have} GPUs; nearest valid: {have}")


def refuse_another_run(folder: Path, run: Run) -> None:
    """Refuse to continue `folder` with a run of other mathematics.

    Raises:
        InputError: the fields that differ from the folder's run.json.
    """
    recorded = folder / "run.json"
    if not recorded.exists():
        return
    old = resolve.recorded(recorded)
    changed = [(key, was, now) for key, was, now in resolve.diff(old, run) if not key.startswith(FREE)]
    if changed:
        rows = "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in changed)
        raise InputError(f"{folder} belongs to another run: {rows}. Take the same settings to continue it, or --name")


@contextmanager
def _claimed(folder: Path, run: Run) -> Iterator[None]:
    """Hold the run folder alone, with this run written in it.

    Raises:
        InputError: no such folder can be made, another process trains there, or it belongs to another run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"runs = {run.runs!r}: {folder} cannot be made or written: {error}; choose another") from None
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process trains here; wait for it, or choose another --name") from None
        refuse_another_run(folder, run)
        _write_run(folder, run)
        yield


def _write_run(folder: Path, run: Run) -> None:
    aside = folder / "run.json.tmp"
    aside.write_text(resolve.to_json(run) + "\n")
    os.replace(aside, folder / "run.json")


def _as_rank(run: Run) -> NoReturn:
    """One rank of an outside launcher (torchrun, srun). The first holds the run folder for all, until it ends."""
    rank, world = _outside_place()
    check_before_start(run, world, outside=True)
    from trainer import train

    folder = run_folder(run)
    if rank:
        refuse_another_run(folder, run)
        train.main([], run)
    with _claimed(folder, run):
        (folder / "logs").mkdir(exist_ok=True)
        train.main([], run)


def _outside_place() -> tuple[int, int]:
    """This process's rank and the number of ranks, as an outside launcher set them.

    Raises:
        InputError: one of the four variables is missing, or is no number where it should be.
    """
    given = {name: os.environ.get(name, "") for name in LAUNCHER_SETS}
    missing = [name for name, value in given.items() if not value]
    wrong = [name for name, value in given.items() if name != "MASTER_ADDR" and value and not value.isdecimal()]
    if missing or wrong:
        what = "not set: " + ", ".join(missing) if missing else "not a number: " + ", ".join(wrong)
        raise InputError(
            f"RANK is set, so an outside launcher is at work, which must set {', '.join(LAUNCHER_SETS)}; {what}. "
            f"Unset RANK to start the ranks from here"
        )
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world:
        raise InputError(f"RANK = {rank}: must be below WORLD_SIZE = {world}; nearest valid: {max(0, world - 1)}")
    return rank, world


def _where(run: Run, folder: Path) -> None:
    """Tell where everything is."""
    print(f"run folder: {folder}")
    if run.tracking.mlflow:
        print(f"MLflow page: mlflow ui --backend-store-uri {tracking_uri(run)}  (then open http://127.0.0.1:5000)")


def eval_command(arguments: list[str]) -> int:
    """`coatnet eval RUN [--json]`: returns the exit code."""
    names = [word for word in arguments if not word.startswith("-")]
    options = set(arguments) - set(names)
    if options & {"-h", "--help"} or not arguments:
        sys.stdout.write(EVAL_USAGE + "\n")
        return 0
    if options - {"--json"} or len(names) != 1:
        raise InputError(f"coatnet eval takes one run folder and --json, not {' '.join(arguments)}")
    from trainer import cluster
    from trainer.launch import free_port, launch

    folder = Path(names[0])
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: not a run folder (it has no run.json); `coatnet train` makes them under runs/")
    run = resolve.recorded(folder / "run.json")
    on_cpu = cluster.device_kind(run) == "cpu"
    world = cluster.local_ranks(run)
    patience = run.cluster.timeout
    code = launch(["trainer.evaluate_run", str(folder)], world, folder / "logs", free_port(), on_cpu, patience)
    if code == 0:
        from trainer.evaluate import describe

        scores = json.loads((folder / "evaluation.json").read_text())
        print(json.dumps(scores) if "--json" in options else f"step {scores['step']}: {describe(scores)}")
    return code
