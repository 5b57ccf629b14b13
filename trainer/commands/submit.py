"""`coatnet submit`: a recipe, or a sweep of one, as jobs of a SLURM cluster. Never imports torch."""

import hashlib
import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from configs.errors import InputError
from configs.schema import Run
from configs.tars import resampled
from data_pipeline.errors import DataError
from data_pipeline.manifest import open_dataset
from models import spec
from slurm import clusters, job, local, snapshot, submit
from trainer.commands.config import Arguments, resolve_command
from trainer.commands.train import refuse_another_run, write_run
from trainer.plan import layout
from trainer.planning import auto

CHECK_STEPS = 50

SUBMIT_USAGE = """usage: coatnet submit RECIPE --nodes N[..M] [--gpus-per-node G] [--cluster PROFILE] [--time LIMIT]
                      [--dry-run | --test-only | --check] [--array FIELD=A,B ...] [--after JOB] [--chain N]
                      [--FIELD VALUE ...]

Submits RECIPE as a SLURM job through submitit. The job's supervisor starts one rank per GPU, watches them, restarts
them after a crash or a hang, and queues the job again at its time limit, after a preemption or a lost node. The code
as it is on disk now is copied into the run's folder, so later edits do not reach a job that waits or is queued again.
`coatnet status`, `logs`, `cancel` and `requeue` take the run's folder. A folder has one job at a time.

--nodes N[..M]       nodes; of a range the job takes what is free, and of that the largest number that divides the batch
--gpus-per-node G    ranks on a node, one per GPU (or CPU ranks where the profile says gpus = false); 8 if not given
--cpus-per-rank C    cores of a rank
--cluster local      in the background of this machine, without SLURM: `coatnet train`, which outlives the terminal;
                     takes no other option but those of the recipe
--cluster PROFILE    a name in ~/.config/coatnet/clusters or a path; `coatnet cluster init` writes a first one
--time LIMIT         the job's time limit, as sbatch takes it: 3-00:00:00
--dry-run            print the script that would be submitted, and do nothing else
--test-only          ask sbatch when and where it would start
--check              50 steps on made-up pictures at this size and node count; waits, and says whether it fits, how fast
--array FIELD=A,B    a sweep: an array with one element per combination, each in a run folder of its own
--after JOB          start when JOB has ended
--chain N            N jobs one after the other, where a job may not queue itself again"""


def submit_command(arguments: list[str]) -> int:
    """`coatnet submit RECIPE ...`: returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(SUBMIT_USAGE)
        return 0
    parser = Arguments("submit", "Submits a recipe as a SLURM job.")
    parser.add_argument("--nodes", default="1")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--cpus-per-rank", type=int, default=0)
    parser.add_argument("--cluster", default="")
    parser.add_argument("--time", default="")
    parser.add_argument("--after", default="")
    parser.add_argument("--chain", type=int, default=1)
    parser.add_argument("--array", action="append", default=[])
    for flag in ("--dry-run", "--test-only", "--check"):
        parser.add_argument(flag, action="store_true")
    options, overrides = parser.parse_known_args(arguments[1:])
    if options.cluster == local.NAME:
        return _submit_here(options, arguments[0], overrides)
    if options.dry_run + options.test_only + options.check > 1:
        raise InputError("--dry-run, --test-only, --check: one of them at a time")
    profile = clusters.load(options.cluster)
    if options.time:
        profile = replace(profile, time=options.time)
    if options.check:
        overrides = [*overrides, "--data.synthetic", "--steps", str(CHECK_STEPS)]
    runs = [_named(resolve_command(arguments[0], [*overrides, *extra]), name) for extra, name in _sweep(options.array)]
    if options.check:
        runs = [replace(run, name=f"{run.name or run.recipe}-check-{time.strftime('%m%d-%H%M%S')}") for run in runs]
    if options.chain < 1 or (options.chain > 1 and (len(runs) > 1 or options.check)):
        raise InputError(
            f"--chain {options.chain}: must be at least 1, and 1 with --array or --check; nearest valid: 1"
        )
    counts = _node_counts(options.nodes, options.gpus_per_node, runs)
    _check_data(runs, profile)
    for run in runs:
        _advise(run, profile, counts, options.gpus_per_node)
    place, code = _places(runs)
    name = runs[0].name or runs[0].recipe
    if len(runs) > 1:
        name = place.parent.name
        runs = [replace(run, tracking=replace(run.tracking, sweep=run.tracking.sweep or name)) for run in runs]
    request = submit.Request(
        name, counts, options.gpus_per_node, options.cpus_per_rank, options.after, options.chain, options.check
    )
    if options.dry_run or options.test_only:
        text = submit.script(submit.executor(place, code / snapshot.digest(), request, profile), len(runs))
        print(text if options.dry_run else submit.test_only(text))
        return 0
    jobs = _send(runs, request, profile)
    if not options.check:
        return 0
    from trainer.commands.jobs import report_check

    return report_check(Path(runs[0].folder), jobs[0])


def _submit_here(options: Namespace, recipe: str, overrides: list[str]) -> int:
    """`coatnet submit RECIPE --cluster local`: returns the exit code.

    Raises:
        InputError: an option that means nothing on one machine, or what `coatnet train` refuses.
    """
    plain = {"nodes": "1", "gpus_per_node": 8, "cpus_per_rank": 0, "time": "", "after": "", "chain": 1, "array": []}
    plain |= {"dry_run": False, "test_only": False, "check": False}
    for name, default in plain.items():
        if getattr(options, name) != default:
            word = f"--{name.replace('_', '-')}"
            raise InputError(f"{word}: belongs to a cluster with SLURM; with --cluster local say --cluster.ranks N")
    from trainer.commands.submit_local import submit_local

    return submit_local(resolve_command(recipe, overrides))


def _send(runs: list[Run], request: submit.Request, profile: clusters.Profile) -> list[str]:
    """Write the runs' folders, copy the code, submit; the jobs' numbers."""
    folders = [Path(run.folder) for run in runs]
    place, codes = _places(runs)
    with ExitStack() as stack:
        for folder, run in zip(folders, runs, strict=True):
            stack.enter_context(submit.claimed(folder))
            refuse_another_run(folder, run)
            write_run(folder, replace(run, runs=str(Path(run.runs).resolve())))
        place.mkdir(parents=True, exist_ok=True)
        code = snapshot.take(codes)
        for number, folder in enumerate(folders):
            command = ["trainer.cli", "train", str(folder.resolve() / "run.json")]
            job.write(submit.describe(folder, command, request, profile, code), place / f"job-{number}.json")
        jobs = submit.send(place, code, request, profile, len(runs))
        for number, folder in enumerate(folders):
            submit.note(folder, [jobs[number]] if len(runs) > 1 else jobs, request, code, place)
    for number, folder in enumerate(folders):
        shown = jobs[number] if len(runs) > 1 else ", ".join(jobs)
        print(f"submitted {shown}: {folder}  (coatnet status {folder}, coatnet logs -f {folder})")
    sys.stdout.flush()
    return jobs


def _places(runs: list[Run]) -> tuple[Path, Path]:
    """Where submitit's files lie, and the copies of the code: in the run's folder, a sweep's in one of its own."""
    if len(runs) == 1:
        return Path(runs[0].folder) / "submitit", Path(runs[0].folder) / "code"
    named = hashlib.sha256("\0".join(run.folder for run in runs).encode()).hexdigest()[:8]
    sweep = Path(runs[0].runs) / f"{runs[0].recipe}-sweep-{named}"
    return sweep / "submitit", sweep / "code"


def _sweep(arrays: list[str]) -> Iterator[tuple[list[str], str]]:
    """Override words and a suffix of the run's name for every combination of `FIELD=A,B` entries."""
    if not arrays:
        yield [], ""
        return
    axes = []
    for entry in arrays:
        field, _, values = entry.removeprefix("--").partition("=")
        if not all(values.split(",")):
            raise InputError(f"--array {entry}: must be FIELD=VALUE,VALUE; for example --array optim.lr=1e-3,8e-4")
        axes.append([(field, value) for value in values.split(",")])
    for chosen in itertools.product(*axes):
        words = [word for field, value in chosen for word in (f"--{field}", value)]
        yield words, "-".join(f"{field.rpartition('.')[2]}{value}" for field, value in chosen)


def _named(run: Run, suffix: str) -> Run:
    """The run of a sweep's element, in a folder of its own."""
    spec.of(run.model)
    return replace(run, name=f"{run.name or run.recipe}-{suffix}") if suffix else run


def _node_counts(text: str, per_node: int, runs: list[Run]) -> tuple[int, ...]:
    """The numbers of nodes in N or N..M that every run's batch can be divided over, ascending.

    Raises:
        InputError: no number, an empty range, or none that divides: with the reason for the largest.
    """
    low, _, high = text.partition("..")
    try:
        first, last = int(low), int(high or low)
    except ValueError:
        raise InputError(f"--nodes {text}: must be a number or N..M, such as 4..8") from None
    if not 1 <= first <= last or per_node < 1:
        raise InputError(f"--nodes {text} --gpus-per-node {per_node}: must be at least 1, and a range must ascend")
    good, reason = [], ""
    for nodes in range(first, last + 1):
        try:
            for run in runs:
                layout(auto.open_layout(run) if run.parallel.layout == "auto" else run, nodes * per_node)
            good.append(nodes)
        except InputError as error:
            reason = str(error)
    if not good:
        raise InputError(f"--nodes {text} x --gpus-per-node {per_node}: {reason}")
    return tuple(good)


def _advise(run: Run, profile: clusters.Profile, counts: tuple[int, ...], per_node: int) -> None:
    """Tell the layout that a run would get on the smallest of these numbers of nodes, or what a better one would save.

    Raises:
        InputError: the planner chooses the layout, and none fits; with the smallest number of devices that would do.
    """
    device = profile.gpu if profile.gpus else "cpu"
    if not device:
        print("layout: the profile does not say which GPU (`gpu`), so the planner was not asked", file=sys.stderr)
        return
    try:
        advice = auto.advise_for(run, counts[0] * per_node, per_node, device)
    except (InputError, DataError) as error:
        if run.parallel.layout == "auto":
            raise
        print(f"layout: the planner has no advice: {error}", file=sys.stderr)
        return
    where = f"{counts[0]} nodes of {per_node} x {device}"
    told = f"auto: {advice.words}, {advice.days:.3g} days" if run.parallel.layout == "auto" else str(advice)
    if told:
        print(f"layout: {told}, on {where}", file=sys.stderr)


def _check_data(runs: list[Run], profile: clusters.Profile) -> None:
    """Refuse data sets that are not there, as far as this machine can tell: in a container paths may differ.

    Raises:
        InputError: see above.
    """
    for run in runs:
        if run.data.synthetic or resampled(run.data) or profile.container:
            continue
        paths = [entry.rpartition(":")[0] for entry in run.data.mixture] or [run.data.path]
        for path in paths:
            if "://" not in path and ".beton" not in path:
                open_dataset(path, look=False)
