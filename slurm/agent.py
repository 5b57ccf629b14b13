"""The supervisor of a run: starts the ranks, watches them, starts them again, queues the job again.

`python3 agent.py JOB.json` is the batch script's only command (`slurm.submit` puts it there), so signals of the
scheduler reach this process. It holds no state but files in the run's folder, so each of its lives goes on from the
last. `coatnet train` runs it in its own process, with a spawner of its own in place of srun, and no scheduler. Python
3.9 and the standard library only: it runs on the host, outside any container.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by its path, from the run's copy of the code
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not the folder of this file

from slurm import beat, logs, nodes, rank, slow, stacks
from slurm.decide import BAD_INPUT, FINAL, STOPPED, UNKNOWN, Budget, Decision, Ended, charge, decide
from slurm.job import Job, read
from slurm.notes import Notes
from slurm.spawn import Allocation, SlurmStep, Step, said

POLL = 1.0  # seconds between two looks at what was asked and at the clock; an end is noticed at once
INSIST = 3.0  # seconds after the first request from which on Ctrl-C again means: at once
DUMP, DUMP_AT_MOST = 3.0, 9.0  # seconds the ranks have to write their stacks; where one is not there yet
LOOK = 5.0  # seconds between two readings of the nodes' signs of life
AGAIN = 10.0  # seconds until ranks that were asked to stop are asked once more
LAST = 300  # seconds to wait for the end that a requeue brings: who exits first may count as completed
OUTAGE = 3600.0  # seconds for which a scheduler that does not answer is asked to queue the job again
ASK_AGAIN, REFUSALS = 10.0, 3  # seconds between two askings; how often one that answers may refuse
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
QUIET = (0, 75, 76, 77, 130)  # ends of which the ranks, or the command, have told a person already
Spawn = Callable[[str, "dict[str, str]"], Step]  # name and environment of a try -> its ranks


class Supervisor:
    """The tries of one run in one job, or on this machine where there is no scheduler."""

    def __init__(self, job: Job, environment: dict[str, str], spawn: Spawn | None = None) -> None:
        """Read where the run stands.

        Args:
            job: what to do.
            environment: of this process.
            spawn: starts the ranks of a try on this machine; None: they are steps of the SLURM job around this process.
        """
        self.job, self.environment, self.spawn = job, environment, spawn
        self.allocation = Allocation(environment) if spawn is None else None
        self.folder = Path(job.folder)
        self.notes = Notes(job, environment, aloud=spawn is None)
        self.event, self.say = self.notes.event, self.notes.say
        # Where a person gives the command again, she has seen why it gave up.
        self.budget = self.notes.load() if self.allocation else Budget()
        self.asked, self.asked_at, self.insisted = "", 0.0, False
        self._try(0)

    def run(self) -> int:
        """All tries; returns the exit code of the whole."""
        previous = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            return self._tries()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _tries(self) -> int:
        """Tries until one of them, or what it means, is the end."""
        self.event("supervise", nodes=self.allocation.hosts if self.allocation else [])
        if self.notes.has("done"):
            return self.leave(Decision("finish", 0, "the run was finished by an earlier job"))
        if self.budget.final:
            return self.leave(Decision("finish", self.budget.final, "an earlier job gave up; `coatnet submit` goes on"))
        self.notes.notify("start")
        tries = 0
        while True:
            decision = self._before() or self._decide(self.attempt())
            if decision.action == "finish" and decision.code not in (0, STOPPED):
                self.budget.final = decision.code
            self.notes.keep(self.budget)
            self.event("decide", action=decision.action, code=decision.code, why=decision.why)
            if self.allocation or (self.job.crashes and decision.code not in QUIET) or decision.action == "again":
                self.say(f"{decision.action}: {decision.why}")
            if decision.action != "again":
                return self.leave(decision)
            self.notes.notify("fault", decision.why)
            self._rest()
            tries += 1
            self._try(tries)

    def _before(self) -> Decision | None:
        """What speaks against another try: a request to stop that nobody has acted on, or nodes that are not fit."""
        unfit = self._unfit() if self.allocation and not self.asked else None
        wanted = self.notes.has("stop")
        if unfit is None and (self.asked or wanted):
            return self._decide(Ended(STOPPED, wanted=wanted, asked=self.asked, **self._outside()))
        return unfit

    def _decide(self, ended: Ended) -> Decision:
        return decide(ended, self.budget, self.job.crashes, self.job.requeue)

    def attempt(self) -> Ended:
        """One try of the ranks, to its end."""
        beats = beat.folder(self.folder, self.name)
        beats.mkdir(parents=True, exist_ok=True)
        for old in beats.iterdir():  # of another machine or container where this process had the same number
            old.unlink()
        told_before = logs.sizes([self.folder / "events" / "rank-00000.jsonl"])
        hosts = self._hosts()
        step = self._start(hosts)
        self.event("try", nodes=hosts)
        code, hung, reached = self._watch(step, beats, hosts)
        ended = Ended(
            code=code,
            done=self.notes.has("done"),
            wanted=self.notes.has("stop"),
            asked=self.asked,
            hung=hung,
            step=reached,
            saved=self.notes.saved(),
            lost=tuple(self.allocation.down()) if self.allocation and code else (),
            **self._outside(),
        )
        self.event(
            "ended", code=code, done=ended.done, asked=ended.asked, hung=hung, step=ended.step, saved=ended.saved
        )
        for path, size in told_before.items():
            self.budget.slow_nodes.update(slow.slow_hosts(path, size, self._host_of_ranks(hosts)))
        traceback = logs.first_traceback(step.logs) if self.allocation and code not in (0, 75) else ""
        if traceback:  # a spawner on this machine has told already
            self.say(traceback)
        return ended

    def _watch(self, step: Step, beats: Path, hosts: list[str]) -> tuple[int, bool, int]:
        """Watch the ranks to their end: exit code, whether they hung, the furthest step."""
        watch, hung = beat.Watch(beats, self.job.first_beat, self.job.beat, self.job.slow), False
        told = looked = float("-inf")
        while (code := step.wait(POLL)) is None:
            now, wrong = time.monotonic(), ""
            if now - looked > LOOK:
                looked, wrong = now, watch.look()
            if self.asked and now - told > AGAIN:  # a step that is just starting does not hear the first
                if self.allocation:
                    self.say(f"asked to stop ({self.asked}): the ranks save and leave")
                step.signal(signal.SIGUSR2)
                told = now
            if self.insisted:
                self.say("Ctrl-C again: the ranks were ended at once, and what they had not saved is lost")
                step.end()
            elif self.asked and now - self.asked_at > self.job.grace:
                self._dump(step, hosts, f"the ranks did not leave within {self.job.grace:.0f} s")
                step.end()
            elif wrong and not (self.asked and now - self.asked_at < self.job.slow):
                hung = True
                self._dump(step, hosts, wrong)
                step.end()
        watch.look()
        return code, hung, watch.step

    def _dump(self, step: Step, hosts: list[str], why: str) -> None:
        """Have all ranks write where they are, and say who hangs."""
        before = logs.sizes(step.logs)
        step.signal(signal.SIGUSR1)
        asked = time.monotonic()
        _sleep(DUMP)
        said = logs.added(step.logs, before)
        while time.monotonic() - asked < DUMP_AT_MOST and not all(stacks.read(text).frames for text in said.values()):
            _sleep(1.0)
            said = logs.added(step.logs, before)
        hang = stacks.culprit(said, dict(enumerate(self._host_of_ranks(hosts))))
        self.event("hung", why=why, ranks=hang.ranks, collectives=hang.collectives, named=hang.text)
        self.say(f"{why}: {hang.text}")

    def _unfit(self) -> Decision | None:
        """See to it that the nodes answer and are fit; what to do where some are not."""
        hosts = self._hosts()
        environment = rank.of_try(self.job, self.name, self.environment, hosts)
        environment["COATNET_RANKS"] = str(self.job.ranks_per_node)
        stem = self.job.state / f"preflight.{self.name}"
        unfit = nodes.unfit(hosts, self.job.preflight, stem, environment, self.job.srun)
        if not unfit and self.job.links and len(hosts) > 1:
            links = stem.with_name(f"links.{self.name}")
            unfit = nodes.unfit(hosts, self.job.links, links, environment, self.job.srun)
        if not unfit:
            return None
        self.event("preflight", bad=sorted(unfit), said=unfit)
        what = f"not fit: {'; '.join(f'{host}: {said}' for host, said in sorted(unfit.items()))}"
        if len(unfit) == len(hosts) > 1:  # the nodes are not to blame, all at once
            return charge(self.budget, self.notes.saved(), self.job.crashes, f"every node is {what}", 1)
        if len(hosts) == 1:  # the node, or what every node would say: so many in a row are not to blame
            decision = charge(self.budget, self.notes.saved(), self.job.crashes, f"the only node is {what}", 1)
            if decision.action == "finish":
                return decision
        self.budget.bad_nodes = sorted({*self.budget.bad_nodes, *unfit})
        if len(self._hosts()) in self.job.node_counts:
            return Decision("again", 0, f"{what}; going on with {len(self._hosts())} nodes")
        if not self.job.requeue:
            return Decision("finish", 1, f"{what}, and the job may not be queued again")
        return Decision("requeue", 0, what)

    def broken(self) -> Decision:
        """What to do where the supervisor itself has failed: a life like any other, so another one."""
        decision = charge(self.budget, self.notes.saved(), self.job.crashes, "the supervisor failed", 1)
        self.notes.keep(self.budget)
        again = decision.action == "again" and self.job.requeue
        decision = Decision("requeue", 0, decision.why) if again else Decision("finish", 1, decision.why)
        self.event("decide", action=decision.action, code=decision.code, why=decision.why)
        return decision

    def leave(self, decision: Decision) -> int:
        """Carry out what ends this job, or this life of it."""
        if decision.action == "finish":
            kind = "done" if decision.code == 0 else "stopped" if decision.code == STOPPED else "give-up"
            self.notes.notify(kind, decision.why)
            return decision.code
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # this process outlives the TERM that a requeue brings
        if decision.action == "requeue":
            refused = self._requeue()
            if refused:
                self.say(f"{refused}; `coatnet submit` goes on from the newest checkpoint")
                self.event("decide", action="finish", code=STOPPED, why=refused)
                self.notes.notify("give-up", refused)
                return STOPPED
            self.notes.notify("fault", decision.why)  # only now: what follows may end this process at any time
        _sleep(LAST)
        return STOPPED

    def _requeue(self) -> str:
        """Queue the job again, as long as that takes; nothing, or why it stays as it is.

        A scheduler that does not answer may be starting anew. One that does and refuses is asked again a few times; and
        where the job does not run any more the scheduler was quicker.
        """
        assert self.allocation is not None
        end, refusals, refused = time.monotonic() + OUTAGE, 0, ""
        while time.monotonic() < end:
            refused = self.allocation.requeue(self.budget.bad_nodes)
            state = self.allocation.state() if refused else ""
            if not refused or state not in ("", "RUNNING"):
                if refused:
                    self.say(f"{refused} (the job is {state})")
                return ""
            refusals += state == "RUNNING"
            if refusals >= REFUSALS:
                break
            _sleep(ASK_AGAIN)
        return refused

    def _try(self, number: int) -> None:
        """Begin a try; its name is unlike any other of the run: job, its requeues, tries in this life."""
        job = self.allocation.name if self.allocation else "local"
        requeues = self.allocation.requeues if self.allocation else os.getpid()
        self.name = f"{job}.{requeues}.{number}"
        self.notes.place = {"job": job, "try": self.name}

    def _rest(self) -> None:
        """Wait before the next try where the last ones failed too; what failed may be away for a moment."""
        pause = self.job.pause * 4.0 ** (self.budget.crashes - 2) if self.budget.crashes > 1 else 0.0
        end = time.monotonic() + pause
        while time.monotonic() < end and not self.asked:
            _sleep(min(POLL, pause))

    def _ask(self, number: int, frame: object) -> None:
        """Note a signal; `_watch` acts on it."""
        now = time.monotonic()
        if not self.asked:
            self.asked = "time" if number == signal.SIGUSR2 and self.allocation else "term"
            self.asked_at = now
        self.insisted |= number == signal.SIGINT and now - self.asked_at >= INSIST

    def _outside(self) -> dict[str, Any]:
        """What the scheduler says of the job."""
        if self.allocation is None:
            return {}
        return {"outside": self.allocation.state() or UNKNOWN, "preempted": self.allocation.preempted()}

    def _hosts(self) -> list[str]:
        """The nodes that a try uses: fit ones, as many as the batch can be divided over."""
        if self.allocation is None:
            return []
        hosts = [host for host in self.allocation.hosts if host not in self.budget.bad_nodes]
        return slow.chosen(hosts, self.budget.slow_nodes, self.job.node_counts)

    def _host_of_ranks(self, hosts: list[str]) -> list[str]:
        """Of every rank its host."""
        return [host for host in hosts for _ in range(self.job.ranks_per_node)]

    def _start(self, hosts: list[str]) -> Step:
        """Start the ranks."""
        end = self.allocation.end_time() if self.allocation else 0
        environment = rank.of_try(self.job, self.name, self.environment, hosts, end)
        if self.spawn is not None:
            return self.spawn(self.name, environment)
        assert self.allocation is not None
        return SlurmStep(self.job, self.allocation, str(self.folder / "logs" / self.name), hosts, environment)


def _sleep(seconds: float) -> None:
    """Sleep as long although signals come."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 1.0))


def main(arguments: list[str]) -> int:
    """Supervise the run of a job file; submitit appends words of its own, which mean nothing here."""
    if "SLURM_JOB_ID" not in os.environ:
        print("slurm/agent.py is a job's command; `coatnet train` starts a run on this machine", file=sys.stderr)
        return BAD_INPUT
    supervisor = Supervisor(read(arguments[0]), dict(os.environ))
    if not said("scontrol", "--version"):
        supervisor.say("scontrol is missing on this node: the job cannot be queued again")
    try:
        code = supervisor.run()
    except Exception:  # a fault of ours, or a disk in the middle of something: another life may do better
        supervisor.say(traceback.format_exc())
        code = supervisor.leave(supervisor.broken())
    if code in FINAL:
        supervisor.say(f"exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
