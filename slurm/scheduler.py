"""What the scheduler says of jobs: squeue first, then scontrol, then sacct where there is accounting."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from configs.errors import InputError

OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
)  # fmt: skip


def ask(*words: str, patience: float = 60.0) -> str:
    """What a command of the scheduler prints.

    Raises:
        InputError: the command is missing here, fails or does not answer; in its own words.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience)
    except FileNotFoundError:
        raise InputError(f"{words[0]}: no such command on this machine; log in where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{words[0]} did not answer within {patience:.0f} s; the scheduler may be down") from None
    if done.returncode:
        raise InputError(f"{' '.join(words[:2])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def states(job: str) -> dict[str, str]:
    """State by job or array element, of all that the scheduler still knows under a job's number; the newest word wins.

    Raises:
        InputError: the scheduler does not answer.
    """
    try:
        queued = ask("squeue", "-h", "-r", "-j", job, "-o", "%i %T %r")
    except InputError as error:
        if "Invalid job id" not in str(error):
            raise
        queued = ""
    found = dict(line.split(" ", 1) for line in queued.splitlines())
    if found:
        return found
    try:
        kept = ask("scontrol", "-o", "show", "job", job)
    except InputError as error:
        if "Invalid job id" not in str(error):
            raise
        kept = ""
    for line in kept.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        name = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if "ArrayTaskId" in fields else fields["JobId"]
        found[name] = fields["JobState"]
    return found or _accounted(job)


def _accounted(job: str) -> dict[str, str]:
    """What accounting remembers of a job; nothing where there is no accounting."""
    try:
        told = ask("sacct", "-n", "-P", "-X", "-j", job, "-o", "JobID,State")
    except InputError:
        return {}
    return dict(line.split("|", 1) for line in told.splitlines() if "|" in line)


def partition_of(name: str) -> dict[str, str]:
    """What scontrol says of a partition, of the default one for an empty name; nothing if there is none.

    Raises:
        InputError: the scheduler does not answer.
    """
    for line in ask("scontrol", "-o", "show", "partition").splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        if fields.get("PartitionName") == name or (not name and fields.get("Default") == "YES"):
            return fields
    return {}


def longest(partition: str) -> str:
    """The longest time limit of a partition, or of the default one, as sbatch takes it; a day where there is none."""
    limit = partition_of(partition).get("MaxTime", "UNLIMITED")
    return limit if limit != "UNLIMITED" else "1-00:00:00"


def seconds(limit: str) -> float:
    """A time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; infinite for none.

    Raises:
        InputError: it is none of these.
    """
    if limit.upper() in ("0", "UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise InputError(f"time = {limit!r}: must be as sbatch takes it: minutes, H:M:S or D-H:M:S; such as 3-00:00:00")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400.0 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def over(state: str) -> bool:
    """Whether a job in this state will not run again."""
    return state.startswith(OVER)


def last_job(folder: Path) -> dict[str, Any]:
    """What `coatnet submit` wrote about a run's newest job: {"jobs": [numbers], ...}; empty where it never did."""
    path = folder / "job.json"
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def live(folder: Path) -> list[str]:
    """The numbers of a run's jobs that wait or run.

    Raises:
        InputError: the scheduler does not answer.
    """
    jobs = last_job(folder).get("jobs", [])
    return [job for job in jobs if any(not over(state) for state in states(job).values())]
