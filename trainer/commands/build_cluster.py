"""`coatnet data build SOURCE --out DIR --cluster PROFILE`: the tasks of a build as an array of jobs. No torch."""

import sys
from pathlib import Path

from configs.errors import InputError
from slurm import clusters, scheduler, snapshot, tasks

TASKS = 64  # of a build, if nobody says


def tasks_for(wanted: int) -> int:
    """How many tasks to cut a build into, so that the cluster takes them as one array.

    Raises:
        InputError: more than an array may have.
    """
    most = tasks.most_elements()
    if wanted > most:
        raise InputError(f"--tasks {wanted}: an array may have {most} elements here; nearest valid: {most}")
    return wanted or min(TASKS, most)


def send(out: str, count: int, profile_name: str, cpus: int) -> tuple[str, str]:
    """Submit a planned build: an array of its tasks, and the merge after it.

    Args:
        out: the data set's folder, on a disk that all nodes share.
        count: of tasks.
        profile_name: of the cluster.
        cpus: cores of a task.

    Returns:
        The numbers of the array and of the merge.
    """
    profile, root = clusters.load(profile_name), Path(out).resolve()
    place = root.parent / f"{root.name}.jobs"
    place.mkdir(parents=True, exist_ok=True)
    code = snapshot.take(place / "code")
    words = ["trainer.cli", "data", "run", str(root), "--task", tasks.NUMBER if count > 1 else "0"]
    command = tasks.script_command(words, code, profile, again=True)
    array = tasks.send(tasks.executor(place, f"{root.name}-build", command, profile, cpus=cpus, again=True), count)
    command = tasks.script_command(["trainer.cli", "data", "merge", str(root)], code, profile)
    merge = tasks.send(tasks.executor(place, f"{root.name}-merge", command, profile, after=array, cpus=cpus))
    print(f"{root}: submitted {count} tasks as job {array}, the merge as job {merge}; logs in {place}", flush=True)
    return array, merge


def wait(out: str, array: str, merge: str) -> None:
    """Wait for the end of a build.

    Raises:
        InputError: a task or the merge failed; with the end of its log.
    """
    state = tasks.wait(merge)
    if state.startswith("COMPLETED"):
        return
    failed = {job: said for job, said in scheduler.states(array).items() if not said.startswith("COMPLETED")}
    place = Path(out).resolve().parent / f"{Path(out).resolve().name}.jobs"
    logs = [place / f"{job}_0_log.err" for job in [*failed, merge]]
    told = [f"{log}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists() and log.stat().st_size]
    sys.stderr.write("\n".join(told[:1]) + "\n" if told else "")
    what = ", ".join(f"{job} {said}" for job, said in failed.items()) or "the tasks COMPLETED"
    raise InputError(f"{out}: the merge is {state}, {what}; the same command goes on where it stopped")
