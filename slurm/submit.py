"""A recipe becomes a job: submitit writes and sends the script, whose only command is the supervisor.

submitit pickles what it is given; that is a few words that nothing reads (`slurm.agent` reads the job's JSON file), so
a queued job depends on no version of anything but the run's own copy of the code.
"""

import contextlib
import fcntl
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from slurm import job, scheduler
from slurm.clusters import Profile

EARLY = 60  # seconds by which SLURM may signal too early


@dataclass(frozen=True)
class Request:
    """What a job is to get.

    Attributes:
        name: of the job in the queue.
        node_counts: numbers of nodes it may run on, ascending; one or more.
        ranks_per_node: tasks of a node, one per GPU where there are GPUs.
        cpus_per_rank: cores of a task; 0 leaves it to the cluster.
        after: a job that must have ended first.
        chain: jobs that follow one another, for clusters where a job may not queue itself again.
        once: whether a failure is the result: nothing is tried again.
    """

    name: str
    node_counts: tuple[int, ...]
    ranks_per_node: int
    cpus_per_rank: int = 0
    after: str = ""
    chain: int = 1
    once: bool = False

    def requeues(self, profile: Profile) -> bool:
        """Whether the job may queue itself again."""
        return profile.requeue and self.chain == 1 and not self.once


class Start:
    """What submitit pickles: the path of the job's description, and what it would mean without the supervisor."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> str:
        """Never called: the batch script runs the supervisor in place of submitit's own command."""
        raise RuntimeError(f"{self.path} is run by slurm/agent.py")


def describe(folder: Path, command: list[str], request: Request, profile: Profile, code: Path) -> job.Job:
    """The job of a run: what the supervisor will read."""
    environment = dict(profile.environment)
    if profile.interface:
        environment = {"NCCL_SOCKET_IFNAME": profile.interface, "GLOO_SOCKET_IFNAME": profile.interface, **environment}
    return job.Job(
        folder=str(folder.resolve()),
        code=str(code.resolve()),
        python=profile.python or sys.executable,
        command=command,
        ranks_per_node=request.ranks_per_node,
        node_counts=list(request.node_counts),
        cpus_per_rank=request.cpus_per_rank or profile.cpus_per_rank,
        container=shlex.split(profile.container),
        srun=shlex.split(profile.srun),
        preflight=shlex.split(profile.preflight) or _doctor("--node", folder, profile),
        links=_doctor("--links", folder, profile) if profile.gpus and request.node_counts[-1] > 1 else [],
        notify=profile.notify,
        environment=environment,
        requeue=request.requeues(profile),
        crashes=0 if request.once else profile.crashes,
        pause=float(profile.pause_seconds),
        first_beat=float(profile.start_seconds),
        beat=float(profile.hang_seconds),
        slow=float(profile.slow_seconds),
        grace=float(profile.grace_seconds),
    )


def _doctor(part: str, folder: Path, profile: Profile) -> list[str]:
    """The words with which a node checks itself, inside the container if there is one; quoted for a shell."""
    python = profile.python or sys.executable
    words = [*shlex.split(profile.container), python, "-m", "trainer.cli", "doctor", part, str(folder.resolve())]
    return [shlex.quote(word) for word in words]


def executor(folder: Path, code: Path, request: Request, profile: Profile) -> Any:
    """submitit's AutoExecutor for jobs whose descriptions are `folder`/job-0.json and so on.

    Raises:
        InputError: submitit is not installed, or this is no machine that submits.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("coatnet submit needs submitit: pip install -e '.[slurm]' (or pip install submitit)") from None
    # `exec`: signals of the scheduler reach the batch process only, and submitit's shell would die of them.
    agent = f"exec {profile.host_python} {shlex.quote(str(code.resolve() / 'slurm' / 'agent.py'))}"
    path = f"{shlex.quote(str(folder.resolve()))}/job-${{SLURM_ARRAY_TASK_ID:-0}}.json"
    try:
        found = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_python=f"{agent} {path}")
    except RuntimeError as error:
        raise InputError(f"coatnet submit: {error}") from None
    options: dict[str, Any] = {"signal": f"B:USR2@{profile.signal_seconds}"}
    options["requeue" if request.requeues(profile) else "no-requeue"] = True
    for key in ("partition", "account", "qos", "constraint"):
        if getattr(profile, key):
            options[key] = getattr(profile, key)
    options["time"] = limit = profile.time or scheduler.longest(profile.partition)
    if scheduler.seconds(limit) <= profile.signal_seconds + EARLY:
        raise InputError(
            f"time = {limit!r}: the ranks would be asked to save at once, {profile.signal_seconds} s before the end or "
            f"up to {EARLY} s earlier; a longer time, or a shorter signal_seconds in the cluster's profile"
        )
    if profile.gpus and profile.gpu_option == "gres":
        options["gres"] = f"gpu:{request.ranks_per_node}"
    if request.after:
        options["dependency"] = f"afterany:{request.after}"
    low, high = request.node_counts[0], request.node_counts[-1]
    tasks, cores = request.ranks_per_node, request.cpus_per_rank or profile.cpus_per_rank
    if low != high:
        options["nodes"] = f"{low}-{high}"
        # With the tasks of a node given, SLURM takes no more nodes than tasks of the smallest number of nodes.
        tasks, cores = 0, tasks * max(1, cores)
    found.update_parameters(
        name=request.name,
        nodes=high,
        tasks_per_node=tasks or None,
        gpus_per_node=request.ranks_per_node if profile.gpus and profile.gpu_option == "gpus_per_node" else None,
        cpus_per_task=cores or None,
        slurm_use_srun=False,
        slurm_setup=list(profile.setup) or None,
        slurm_additional_parameters=options | profile.sbatch,
    )
    return found


def script(found: Any, elements: int = 1) -> str:
    """The text that `send` would submit."""
    inner = found._executor
    if elements > 1:
        inner.parameters["map_count"] = elements
    try:
        text: str = inner._make_submission_file_text(inner._submitit_command_str, "")
    finally:
        inner.parameters.pop("map_count", None)
    return text


def test_only(text: str) -> str:
    """What sbatch says it would do with a script.

    Raises:
        InputError: it would refuse it, in its own words and ours.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
    said = (done.stderr + done.stdout).strip()
    if done.returncode:
        raise refusal(said)
    return said


def refusal(said: str) -> InputError:
    """SLURM's words with ours."""
    hints = {
        "partition": "`sinfo -s` lists partitions; set `partition` in the cluster's profile",
        "account": "`sacctmgr show assoc user=$USER` lists your accounts; set `account` in the cluster's profile",
        "qos": "`sacctmgr show qos` lists them; set `qos` in the cluster's profile",
        "node": "`sinfo -N -l` shows the nodes, `sinfo -o '%N %G'` their GPUs; ask for fewer with --nodes or another "
        "partition, or see `gpus` and `gpu_option` in the cluster's profile",
        "time": "`scontrol show partition` shows MaxTime; set `time` in the cluster's profile",
        "gres": "`sinfo -o '%N %G'` shows the GPUs; see `gpus` and `gpu_option` in the cluster's profile",
    }
    last = said.strip().splitlines()[-1] if said.strip() else "sbatch failed without a word"
    hint = next((text for word, text in hints.items() if word in said.lower()), "`sbatch --test-only` asks again")
    return InputError(f"SLURM refuses the job: {last}. {hint}")


def send(folder: Path, code: Path, request: Request, profile: Profile, elements: int = 1) -> list[str]:
    """Submit a job, a chain of them, or an array of so many elements.

    Returns:
        The jobs' numbers; of an array its elements'.

    Raises:
        InputError: SLURM's refusal.
    """
    _require_nodes(folder, code, request, profile, elements)
    sent: list[str] = []
    try:
        if elements > 1:
            paths = [str(folder / f"job-{number}.json") for number in range(elements)]
            return [str(job.job_id) for job in executor(folder, code, request, profile).map_array(_start, paths)]
        for _ in range(request.chain):
            after = replace(request, after=sent[-1] if sent else request.after)
            found = executor(folder, code, after, profile)
            sent.append(str(found.submit(Start(str(folder / "job-0.json"))).job_id))
    except Exception as error:
        if sent:  # the beginning of a chain, of which nobody would know
            scheduler.ask("scancel", *sent)
        if type(error).__name__ != "FailedJobError":
            raise
        raise refusal(str(error)) from None
    return sent


def _require_nodes(folder: Path, code: Path, request: Request, profile: Profile, elements: int) -> None:
    """Refuse more nodes than the partition has: SLURM by default queues such a job, and it waits for ever.

    Raises:
        InputError: SLURM's words and ours.
    """
    name, least = str(profile.sbatch.get("partition", profile.partition)), request.node_counts[0]
    total = scheduler.partition_of(name).get("TotalNodes", "")
    if total.isdecimal() and least > int(total):
        test_only(script(executor(folder, code, request, profile), elements))
        raise refusal(f"the partition has {total} nodes, not {least}")


def _start(path: str) -> str:
    """What submitit pickles for an array's element."""
    return Start(path)()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder while it is submitted; what an older job was asked for, and why it gave up, is over.

    Raises:
        InputError: the run is finished, is being submitted by another process, or has a job that waits or runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "submit.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another `coatnet submit` is at work on it") from None
        if (folder / "done").exists():
            raise InputError(f"{folder}: the run is finished; --name starts another")
        jobs = scheduler.live(folder)
        if jobs:
            raise InputError(
                f"{folder}: job {jobs[0]} of this run waits or runs already; `coatnet status {folder}` shows it, "
                f"`coatnet cancel {folder}` ends it, --name starts another run"
            )
        for old in ("stop", "save", "agent/budget.json"):
            (folder / old).unlink(missing_ok=True)
        yield


def note(folder: Path, jobs: Sequence[str], request: Request, code: Path, place: Path) -> None:
    """Write down which jobs belong to a run, and where their own logs are."""
    content = {
        "jobs": list(jobs),
        "time": time.time(),
        "nodes": list(request.node_counts),
        "ranks_per_node": request.ranks_per_node,
        "code": code.name,
        "logs": str(place.resolve()),
    }
    job.write_whole(folder / "job.json", json.dumps(content, indent=1) + "\n")
    (folder / "events").mkdir(exist_ok=True)
    with (folder / "events" / "submit.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "submit", **content}) + "\n")
