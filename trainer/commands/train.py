"""`coatnet train` and `coatnet eval`: everything is checked here, then ranks are started."""

import fcntl
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from configs import resolve, resume_rules
from configs.errors import InputError
from configs.schema import Run
from trainer.launch import LAUNCHER_SETS
from trainer.tracking.track import PATIENCE, check_sinks, run_folder, tracking_uri

if TYPE_CHECKING:
    from data_pipeline.manifest import Dataset
    from trainer.plan import Layout
    from trainer.planning.fit import Memory

LAST_TRY = 120.0  # seconds that a killed rank of an earlier try may need to leave the run's folder
RESTARTS = 3  # after failures without progress between them

TRAIN_USAGE = """usage: coatnet train RECIPE [--dry-run] [--restarts N] [--field value ...]

Trains RECIPE (see `coatnet config list`) on all devices of this machine, or as one rank where an outside launcher has
set RANK. The run lives in runs/NAME; the same command continues it from its newest verified checkpoint. Ctrl-C,
SIGTERM, SIGUSR2 or a file runs/NAME/stop save and exit with 75, a file runs/NAME/save makes one save; --guard.KIND ACT
says what follows when something goes wrong. Ranks that crash or hang are started again, from that checkpoint. Fields
and their defaults: `coatnet config show RECIPE`.

--dry-run                    print what would run (configuration, layout, DeepSpeed's JSON, parameter groups, schedule,
                             counts, data, memory) and start nothing
--restarts 3                 give up after so many restarts without progress between them; 0: a crash ends the command
--init.path RUN_OR_FILE      start from the weights of another run's newest checkpoint, or of a file of `coatnet
                             export`, at any resolution; --init.weights raw|ema chooses, --init.head reset takes other
                             classes. A run that has a checkpoint of its own continues that instead
--resume.allow NAME ...      what may differ from the checkpoint that the run goes on from: fields (optim.lr), sections
                             (augment.), "dataset"; "scratch": begin anew where none of its checkpoints verifies
--parallel.layout auto       let `coatnet plan` choose the layout for the devices that are here
--profile 20:25              look into steps 21 to 25: a trace, a table by block, memory, in runs/NAME/profile
--parallel.pipeline 2        cut the network into stages; --parallel.offload cpu|nvme takes state off the device. What
                             does not go together is refused, with the reason and the nearest that does
--parallel.trace             record what ranks do with each other in the first steps, for `coatnet trace RUN`
--data.synthetic --steps 50  made-up pictures at the recipe's true size: does it fit, how fast is it

exit codes: 0 done, 75 stopped on request and saved, 76 configuration or data error, 77 stopped by the guard, 130
stopped before the first step, else a crash"""


def train_command(arguments: list[str]) -> int:
    """`coatnet train RECIPE [overrides]`: returns the exit code."""
    from trainer.commands.config import resolve_command

    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(TRAIN_USAGE + "\n")
        return 0
    dry = "--dry-run" in arguments
    arguments, restarts = _restarts([word for word in arguments if word != "--dry-run"])
    if not arguments:
        raise InputError("coatnet train: the recipe is missing; `coatnet config list` has them")
    run = resolve_command(arguments[0], arguments[1:])
    if "RANK" in os.environ and not dry:
        if restarts is not None:
            raise InputError("--restarts: RANK is set, so an outside launcher is at work, and starts the ranks")
        _as_rank(run)
    from trainer import cluster
    from trainer.engine import disk
    from trainer.launch import INTERRUPTED
    from trainer.planning import auto_layout

    run = auto_layout.laid_out(run)
    world = cluster.local_ranks(run)
    facts = check_before_start(run, world)
    if dry:
        from trainer.dry_run import describe

        print(describe(run, *facts))
        return 0
    folder = run_folder(run)
    with _claimed(folder, run) as lock:
        if (folder / "done").exists():
            print(f"{folder} is finished; `coatnet eval {folder}` scores it, --name starts another run")
            _where(run, folder)
            return 0
        if run.parallel.offload == "nvme":
            disk.prepare(run)
        code = supervise(run, folder, world, lock, RESTARTS if restarts is None else restarts)
        if code == INTERRUPTED:
            sys.stderr.write("stopped before the first step; nothing to save\n")
        if code not in (0, 75, 76, 77):
            saved = sorted(path.parent.name for path in folder.glob("checkpoints/step-*/COMPLETE"))
            last = f"the last save is {saved[-1]}" if saved else "nothing was saved yet"
            sys.stderr.write(f"{last}; the same command continues\n")
    _where(run, folder)
    return code


def _restarts(words: list[str]) -> tuple[list[str], int | None]:
    """The words without `--restarts N`, and N; None where it is not among them."""
    rest, found = [], None
    given = iter(words)
    for word in given:
        name, _, value = word.partition("=")
        if name != "--restarts":
            rest.append(word)
            continue
        value = value or next(given, "")
        if not value.isdecimal():
            raise InputError(f"--restarts {value}: must be a number, 0 or more; nearest valid: {RESTARTS}")
        found = int(value)
    return rest, found


def supervise(run: Run, folder: Path, world: int, lock: int, restarts: int) -> int:
    """Have the supervisor of SLURM jobs start the ranks here and watch them; returns the exit code of the whole.

    Args:
        lock: file descriptor of the run's lock, which the ranks hold as well.
        restarts: after failures without progress between them.
    """
    from slurm.agent import Supervisor
    from slurm.job import Job
    from trainer import cluster
    from trainer.health.goodput import BEGAN, process_began
    from trainer.launch import LocalStep, free_port, rank_environment

    words, on_cpu = ["trainer.train", str(folder / "run.json")], cluster.device_kind(run) == "cpu"
    began = [process_began()]

    def spawn(name: str, environment: dict[str, str]) -> LocalStep:
        port = free_port(run.cluster.master_port)
        environment = rank_environment(world, port, on_cpu, environment)
        environment[BEGAN] = str(began.pop() if began else time.time())
        patience = run.cluster.timeout + PATIENCE
        return LocalStep(words, world, folder / "logs", environment, patience, (lock,))

    job = Job(
        folder=str(folder.resolve()),
        code=str(Path(__file__).resolve().parents[2]),
        python=sys.executable,
        command=words,
        ranks_per_node=world,
        requeue=False,
        crashes=restarts,
        grace=math.inf,  # a save takes its time; who cannot wait presses Ctrl-C again
    )
    return Supervisor(job, dict(os.environ), spawn).run()


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
    from trainer import cluster
    from trainer.engine import deepspeed_shims, disk
    from trainer.launch import free_port
    from trainer.machine import extras
    from trainer.plan import layout
    from trainer.planning import fit
    from trainer.stages import partition
    from trainer.state import warm_start

    spec.of(run.model)
    resolve.check(run)
    extras.check_fairscale(run)
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
    if run.parallel.pipeline > 1:
        partition.stages(run, dataset.classes, plan.micro_batch)
    dataset.split("heldout")  # scored at the end, where its absence would come too late
    split = dataset.split("train")
    if split.samples < run.data.global_batch:
        raise InputError(
            f"data.global_batch = {run.data.global_batch}: the training split of {dataset.root} has "
            f"{split.samples} samples; nearest valid: {split.samples}"
        )
    resolve.warmup(run, split.samples)
    warm_start.check(run, dataset, verified=not outside)
    available = cluster.available_bytes(run, local)
    memory = fit.require_fit(run, plan, dataset.classes, available)
    on_disk = fit.require_elsewhere(run, plan, dataset.classes, local, cluster.host_bytes())
    if run.parallel.offload == "nvme":
        disk.check(run, on_disk)
    return dataset, plan, memory, available


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
    differences = resolve.diff(resolve.recorded(recorded), run)
    resume_rules.refuse(differences, run.resume.allow, f"{folder} belongs to another run")


@contextmanager
def _claimed(folder: Path, run: Run, supervised: bool = False) -> Iterator[int]:
    """Hold the run folder alone, with this run written in it; requests to stop or save that an older one left go.

    Args:
        supervised: by a supervisor, whose last try may be a moment from its end; requests are its affair.

    Yields:
        The lock's file descriptor: whoever inherits it holds the folder too, for as long as it lives.

    Raises:
        InputError: no such folder can be made, another process trains there, or it belongs to another run.
        TimeoutError: under a supervisor, another process trains there and does not end.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"runs = {run.runs!r}: {folder} cannot be made or written: {error}; choose another") from None
    deadline = time.monotonic() + LAST_TRY
    with file as lock:
        while not _locked(lock.fileno()):
            if not supervised:
                raise InputError(f"{folder}: another process trains here; wait for it, or choose another --name")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder}: a rank of an earlier try has not ended within {LAST_TRY:.0f} s")
            time.sleep(0.5)
        refuse_another_run(folder, run)
        write_run(folder, run)
        for request in () if supervised else ("stop", "save"):
            (folder / request).unlink(missing_ok=True)
        yield lock.fileno()


def _locked(lock: int) -> bool:
    """Take a file's lock, if nobody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_run(folder: Path, run: Run) -> None:
    """Write the resolved run into its folder, whole or not at all."""
    aside = folder / "run.json.tmp"
    aside.write_text(resolve.to_json(run) + "\n")
    os.replace(aside, folder / "run.json")


def _as_rank(run: Run) -> NoReturn:
    """One rank of an outside launcher (torchrun, srun). The first holds the run folder for all, until it ends."""
    from trainer import cluster
    from trainer.planning import auto_layout

    rank, world = _outside_place()
    run = auto_layout.laid_out(run, world, cluster.local_world())
    check_before_start(run, world, outside=True)
    from trainer import train

    folder = run_folder(run)
    if rank:
        refuse_another_run(folder, run)
        train.main([], run)
    with _claimed(folder, run, supervised="COATNET_TRY" in os.environ):
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
