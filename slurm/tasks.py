"""Commands that need no supervisor, as SLURM arrays: many tasks that may each be repeated, and what follows them.

submitit writes and sends the script, as in `slurm.submit`; its only command is the task's own, which takes its number
from SLURM_ARRAY_TASK_ID. A task whose node is lost or preempted is queued again by SLURM; one that can go on says so
before its time limit (exit code 75) and queues itself again.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from slurm import scheduler, settings
from slurm.clusters import Profile
from slurm.decide import STOPPED
from slurm.submit import Start, refusal

NUMBER = "$SLURM_ARRAY_TASK_ID"  # in a command's words: the task's number
AT_ONCE = 256  # tasks of an array that run side by side
LIMIT_SECONDS = 60  # before its time limit, or up to a minute earlier, a task is asked to end
# What a task that can go on is started by. submitit's script has the batch process `exec` it, so that it gets SLURM's
# signal; where that comes, `wait` returns 128 + 12 before the task's end.
AGAIN = """trap 'kill -TERM $child' USR2
{command} & child=$!
code=140; while [ $code -eq 140 ]; do wait $child; code=$?; done
if [ $code -eq {more} ]; then
    array=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
    scontrol requeue ${{array:-$SLURM_JOB_ID}} && sleep 60
fi
exit $code"""


def most_elements() -> int:
    """The most elements that an array may have on this cluster.

    Raises:
        InputError: the scheduler does not answer.
    """
    config = settings.parse_config(scheduler.ask("scontrol", "show", "config"))
    return max(1, int(config.get("MaxArraySize", "1001")) - 1)


def script_command(words: Sequence[str], code: Path, profile: Profile, again: bool = False) -> str:
    """What stands in submitit's script in place of Python; the words that submitit appends are lost on purpose.

    Args:
        words: module and arguments after `python -m`, NUMBER among them for an array.
        code: where the copy of the code lies.
        profile: of the cluster.
        again: queue the task again where it ends with 75 before its time limit, if the cluster allows that.
    """
    run = " ".join(word if word == NUMBER else shlex.quote(word) for word in words)
    python = shlex.quote(profile.python or sys.executable)
    path = f"{shlex.quote(str(code.resolve()))}${{PYTHONPATH:+:$PYTHONPATH}}"
    line = f"{profile.container} {python} -u -m {run}".strip()
    if again and profile.requeue:
        line = f"export PYTHONPATH={path} PYTHONSAFEPATH=1\n{AGAIN.format(command=line, more=STOPPED)}"
    else:
        line = f"PYTHONPATH={path} PYTHONSAFEPATH=1 exec {line}"
    return f"exec bash -c {shlex.quote(line)} task"


def executor(
    place: Path, name: str, command: str, profile: Profile, after: str = "", cpus: int = 1, again: bool = False
) -> Any:
    """submitit's AutoExecutor for such a command.

    Args:
        place: folder of submitit's files and of the logs.
        name: of the job in the queue.
        command: by `script_command`.
        after: number of a job that must have succeeded; if it does not, this one is cancelled.
        cpus: cores of a task.
        again: as in `script_command`.

    Raises:
        InputError: submitit is not installed, or this is no machine that submits.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("--cluster needs submitit: pip install -e '.[slurm]' (or pip install submitit)") from None
    try:
        found = submitit.AutoExecutor(folder=place, cluster="slurm", slurm_python=command)
    except RuntimeError as error:
        raise InputError(f"--cluster: {error}") from None
    options: dict[str, Any] = {"requeue" if profile.requeue else "no-requeue": True}
    for key in ("partition", "account", "qos", "constraint", "time"):
        if getattr(profile, key):
            options[key] = getattr(profile, key)
    if again and profile.requeue:
        options["signal"] = f"B:USR2@{LIMIT_SECONDS}"
    if after:
        options |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    found.update_parameters(
        name=name,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=cpus,
        slurm_use_srun=False,
        slurm_array_parallelism=AT_ONCE,
        slurm_setup=list(profile.setup) or None,
        slurm_additional_parameters=options | profile.sbatch,
    )
    return found


def send(found: Any, elements: int = 1) -> str:
    """Submit one job, or an array; its number.

    Raises:
        InputError: SLURM's refusal.
    """
    try:
        if elements > 1:
            jobs = found.map_array(Start.__call__, [Start(str(number)) for number in range(elements)])
            return str(jobs[0].job_id).partition("_")[0]
        return str(found.submit(Start("0")).job_id)
    except Exception as error:
        if type(error).__name__ != "FailedJobError":
            raise
        raise refusal(str(error)) from None


def wait(job: str, every: float = 2.0) -> str:
    """Wait until a job is over; its state, as the scheduler has it.

    Raises:
        InputError: the scheduler does not answer, or has forgotten the job.
    """
    while True:
        states = scheduler.states(job)
        if not states:
            raise InputError(f"job {job}: SLURM does not know it any more; its logs say what became of it")
        if all(scheduler.over(state) for state in states.values()):
            return ", ".join(sorted(set(states.values())))
        time.sleep(every)
