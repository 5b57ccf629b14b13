"""`coatnet train` and `coatnet eval`: everything is checked here, then ranks are started."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from trainer.track import run_folder, tracking_uri

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
    "data.workers",
    "parallel.",
    "checkpoint.",
    "evaluate.",
    "tracking.",
    "cluster.",
)

TRAIN_USAGE = """usage: coatnet train RECIPE [--dry-run] [--field value ...]

Trains RECIPE (see `coatnet config list`) on all devices of this machine, or as one rank where an outside launcher has
set RANK. The run lives in runs/NAME; the same command continues it from its newest verified checkpoint, Ctrl-C saves
and exits with 75. Fields and their defaults: `coatnet config show RECIPE`.

--dry-run                    print what would run (configuration, layout, DeepSpeed's JSON, parameter groups, schedule,
                             counts, data, memory) and start nothing
--data.synthetic --steps 50  made-up pictures at the recipe's true size: does it fit, how fast is it

exit codes: 0 done, 75 stopped on request and saved, 76 configuration or data error, 77 diverged, else a crash"""

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
        return _as_rank(run)
    from trainer import cluster
    from trainer.launch import free_port, launch

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
        code = launch(["trainer.train", str(folder / "run.json")], world, folder / "logs", port, on_cpu)
        if code not in (0, 75, 76, 77):
            saved = sorted(path.parent.name for path in folder.glob("checkpoints/step-*/COMPLETE"))
            last = f"the last save is {saved[-1]}" if saved else "nothing was saved yet"
            sys.stderr.write(f"{last}; the same command continues\n")
    _where(run, folder)
    return code


def check_before_start(run: Run, world: int) -> "tuple[Dataset, Layout, Memory, int]":
    """Refuse before anything starts what would fail later: data, model, batch, devices, memory, port.

    Returns:
        The data set, the layout, the memory of a rank as estimated, and what a rank has.

    Raises:
        InputError: what is wrong, where, and what would do.
    """
    from data_pipeline.stream import open_data
    from models import spec
    from trainer import cluster, deepspeed_shims, fit
    from trainer.launch import free_port
    from trainer.plan import layout

    spec.get(run.model.name)
    resolve.check(run)
    plan = layout(run, world)
    free_port(run.cluster.master_port)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    _check_devices(run, local)
    deepspeed_shims.check_version()
    dataset = open_data(run)
    split = dataset.split("train")
    if split.samples < run.data.global_batch:
        raise InputError(
            f"data.global_batch = {run.data.global_batch}: the training split of {run.data.path} has "
            f"{split.samples} samples; nearest valid: {split.samples}"
        )
    warmup, steps = resolve.warmup(run, split.samples), resolve.total_steps(run, split.samples)
    if warmup >= steps:
        raise InputError(f"optim.warmup_steps = {warmup}: the run has only {steps} steps; nearest valid: {steps - 1}")
    available = cluster.available_bytes(run, local)
    return dataset, plan, fit.require_fit(run, plan, dataset.classes, available), available


def _check_devices(run: Run, ranks: int) -> None:
    """Refuse more ranks on this machine than it has GPUs."""
    from trainer import cluster

    if cluster.device_kind(run) != "cuda":
        return
    import torch

    have = torch.cuda.device_count()
    if ranks > have:
        raise InputError(f"cluster.ranks = {ranks}: this machine has {have} GPUs; nearest valid: {have}")


def refuse_another_run(folder: Path, run: Run) -> None:
    """Refuse to continue `folder` with a run of other mathematics.

    Raises:
        InputError: the fields that differ from the folder's run.json.
    """
    recorded = folder / "run.json"
    if not recorded.exists():
        return
    old = resolve.from_json(recorded.read_text())
    changed = [(key, was, now) for key, was, now in resolve.diff(old, run) if not key.startswith(FREE)]
    if changed:
        rows = "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in changed)
        raise InputError(f"{folder} belongs to another run: {rows}. Take the same settings to continue it, or --name")


@contextmanager
def _claimed(folder: Path, run: Run) -> Iterator[None]:
    """Hold the run folder alone, with this run written in it.

    Raises:
        InputError: another process trains there, or the folder belongs to another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
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


def _as_rank(run: Run) -> int:
    """One rank of an outside launcher (torchrun, srun)."""
    from trainer import train
    from trainer.stopping import StopFlag

    check_before_start(run, int(os.environ["WORLD_SIZE"]))
    folder = run_folder(run)
    refuse_another_run(folder, run)
    if os.environ["RANK"] == "0":
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        _write_run(folder, run)
    return train.train(run, StopFlag())


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
    run = resolve.from_json((folder / "run.json").read_text())
    on_cpu = cluster.device_kind(run) == "cpu"
    world = cluster.local_ranks(run)
    code = launch(["trainer.evaluate_run", str(folder)], world, folder / "logs", free_port(), on_cpu)
    if code == 0:
        from trainer.evaluate import describe

        scores = json.loads((folder / "evaluation.json").read_text())
        print(json.dumps(scores) if "--json" in options else f"step {scores['step']}: {describe(scores)}")
    return code
