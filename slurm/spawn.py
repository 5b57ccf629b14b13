"""How the ranks of one try are started, watched and ended by srun over a job's nodes.

`trainer/launch.py` has the same for this machine. Python 3.9 and the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from slurm.decide import FINAL
from slurm.job import Job

# What srun says of a task that did not end well, and of those that died of a signal.
_FAILED = re.compile(r"^srun: error: \S+: tasks? [^:]+: (?:Exited with exit code (?P<code>\d+)|(?P<how>.+?))\s*$", re.M)
_KILLED_BY = {
    "Killed": 137, "Terminated": 143, "Aborted": 134, "Segmentation fault": 139, "Bus error": 135,
    "Out Of Memory": 137, "Aborted (core dumped)": 134, "Segmentation fault (core dumped)": 139,
}  # fmt: skip
RELEASES, RELEASE_PAUSE = 30, 10.0  # how often a held job is released until it is, seconds between
WAIT = 180  # seconds the other ranks have once one has left as it should, before srun ends them


def said(*words: str, patience: float = 60.0) -> str:
    """What a command of the scheduler prints; nothing if it fails or does not answer in time."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=patience, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def refused(*words: str, patience: float = 60.0) -> str:
    """Why a command of the scheduler fails, nothing where it does not."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=patience, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]}: {error}"
    return f"{' '.join(words[:2])}: {(done.stderr or done.stdout).strip() or 'failed'}" if done.returncode else ""


class Allocation:
    """The job that this process supervises: its names, nodes and place in the queue."""

    def __init__(self, environment: dict[str, str]) -> None:
        array = environment.get("SLURM_ARRAY_JOB_ID")
        # What the scheduler must be asked by: the number of an array's last element is that of the whole array.
        self.name = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]
        self.requeues = int(environment.get("SLURM_RESTART_COUNT") or 0)
        self.nodelist = environment["SLURM_JOB_NODELIST"]
        self.hosts = said("scontrol", "show", "hostnames", self.nodelist).split()

    def state(self) -> str:
        """What the scheduler says of the job, empty where it does not know it."""
        return said("squeue", "-h", "-j", self.name, "-o", "%T").partition("\n")[0]

    def end_time(self) -> int:
        """When the time limit ends the job, seconds since 1970; 0 without a limit."""
        told = said("squeue", "-h", "-j", self.name, "-o", "%e").partition("\n")[0]
        with contextlib.suppress(ValueError):
            return int(time.mktime(time.strptime(told, "%Y-%m-%dT%H:%M:%S")))
        return 0

    def down(self) -> list[str]:
        """Its hosts that the scheduler counts as down or not answering."""
        told = said("sinfo", "-h", "-N", "-n", ",".join(self.hosts), "-o", "%N %T")
        bad = []
        for line in told.splitlines():
            host, _, state = line.partition(" ")
            if state.endswith("*") or state.rstrip("*").startswith(("down", "fail")):
                bad.append(host)
        return sorted(set(bad))

    def preempted(self) -> bool:
        """Whether the scheduler has preempted it: it runs on for its grace time only."""
        return bool(self._fact("PreemptTime"))

    def _fact(self, name: str) -> str:
        """What the scheduler says under a name about the job, empty for nothing."""
        found = re.search(rf"\b{name}=(\S+)", said("scontrol", "-o", "show", "job", self.name))
        return found[1] if found is not None and found[1] not in ("None", "Unknown", "N/A", "(null)") else ""

    def requeue(self, bad: list[str]) -> str:
        """Queue the job again, never on the hosts in `bad`; the scheduler ends this process soon after.

        Returns:
            Nothing, or why the scheduler refuses.
        """
        if not bad:
            return refused("scontrol", "requeue", self.name)
        without = ",".join(filter(None, (self._fact("ExcNodeList"), *bad)))  # some were excluded by the user
        # The list can only be changed while the job is not eligible. It is released whatever becomes of the list.
        held = refused("scontrol", "requeuehold", self.name)
        if held:
            return held
        changed = refused("scontrol", "update", f"JobId={self.name}", f"ExcNodeList={without}")
        for _ in range(RELEASES):
            released = refused("scontrol", "release", self.name)
            if not released:
                break
            time.sleep(RELEASE_PAUSE)
        return released or (f"queued again, but {', '.join(bad)} may be used: {changed}" if changed else "")


def telling_code(said: str, code: int) -> int:
    """The exit code of a step that says most: of bad input or a divergence, else that of the task that failed first.

    srun itself gives the highest, often that of a rank which it ended because another one had failed.

    Args:
        said: what srun had to say.
        code: its own exit code.
    """
    codes = []
    for found in _FAILED.finditer(said):
        codes.append(int(found["code"]) if found["code"] else _KILLED_BY.get(found["how"], code))
    return next((one for one in codes if one in FINAL), codes[0] if codes and code else code)


class Step(Protocol):
    """The ranks of one try.

    Attributes:
        logs: files of the ranks' standard error, in the ranks' order.
    """

    logs: list[Path]

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of all ranks, so long at most: the exit code of the whole, None while they run."""

    def signal(self, number: int) -> None:
        """Send every rank a signal."""

    def end(self) -> None:
        """Kill the ranks and what they started."""


class SlurmStep:
    """The ranks of one try as a step of the job."""

    def __init__(
        self, job: Job, allocation: Allocation, stem: str, hosts: list[str], environment: dict[str, str]
    ) -> None:
        """Start them.

        Args:
            job: what to start.
            allocation: where.
            stem: of the logs' names; the rank's number and .out or .err follow.
            hosts: the nodes to use.
            environment: of the ranks.
        """
        self._allocation = allocation
        ranks = len(hosts) * job.ranks_per_node
        words = ["srun", "--unbuffered", "--kill-on-bad-exit=1", f"--wait={WAIT}", "--export=ALL"]
        words += [f"--nodes={len(hosts)}", f"--nodelist={','.join(hosts)}", f"--ntasks={ranks}"]
        words += [f"--ntasks-per-node={job.ranks_per_node}", "--distribution=block"]
        words += [f"--cpus-per-task={job.cpus_per_rank}"] if job.cpus_per_rank else []  # srun no longer inherits it
        words += [f"--output={stem}.%t.out", f"--error={stem}.%t.err"]
        words += [*job.srun, *job.container, job.python, "-u", "-m", "slurm.rank", *job.command]
        self._before = set(self._numbers())
        self._said = Path(f"{stem}.srun")
        with self._said.open("ab") as said_by_srun:
            self._process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stderr=said_by_srun, start_new_session=True
            )
        self.logs = [Path(f"{stem}.{rank}.err") for rank in range(ranks)]

    def wait(self, seconds: float) -> int | None:
        """Wait for the step's end, so long at most: its exit code, None while it runs."""
        try:
            code = self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        told = self._said.read_text(encoding="utf-8", errors="replace")
        sys.stderr.write(told)
        return telling_code(told, code if code >= 0 else 128 - code)

    def signal(self, number: int) -> None:
        """Send every rank a signal."""
        for step in self._own():
            said("scancel", f"--signal={signal.Signals(number).name[3:]}", step)

    def end(self) -> None:
        """Kill the ranks and wait until the step is over; srun itself goes last."""
        deadline = time.monotonic() + 30
        while self._process.poll() is None:
            self.signal(signal.SIGKILL)  # of the step: of the job's number it would cancel the job
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            else:
                time.sleep(1)

    def _own(self) -> list[str]:
        """The numbers of the job's steps that were not there before this one."""
        return [step for step in self._numbers() if step not in self._before]

    def _numbers(self) -> list[str]:
        """The numbers of the job's steps that run ranks: 12.0, 12.1, not 12.batch, and of no other array element."""
        told = said("squeue", "-h", "-s", "-j", self._allocation.name, "-o", "%i").split()
        return [step for step in told if re.fullmatch(rf"{self._allocation.name}\.[0-9]+", step)]
