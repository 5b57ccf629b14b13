"""What follows from how a try ended: a pure function, so that the table in the tests is the whole truth about it.

Python 3.9 and the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DONE, STOPPED, BAD_INPUT, DIVERGED = 0, 75, 76, 77  # the trainer's exit codes
FINAL = (BAD_INPUT, DIVERGED)  # another try would end the same way
UNKNOWN = "UNKNOWN"  # the state of a job whose scheduler does not answer


@dataclass(frozen=True)
class Ended:
    """One try of the ranks, over.

    Attributes:
        code: what the ranks' step gave; 128 + signal for a killed one.
        done: whether the training, not the process, is finished.
        wanted: whether somebody asked the run itself to stop, by the file `stop` in its folder.
        asked: why the supervisor had asked the ranks to stop: "time", "term", or nothing.
        hung: whether the supervisor killed them because nothing moved.
        step: the last update that the ranks told of, 0 for none.
        saved: the one of the newest checkpoint.
        outside: what the scheduler says of the job, such as "RUNNING" or "COMPLETING"; `UNKNOWN` where it does not
            answer, empty without a scheduler.
        preempted: whether the scheduler is about to take the nodes away, and has the job run on for its grace time.
        lost: nodes that no longer answer.
    """

    code: int
    done: bool = False
    wanted: bool = False
    asked: str = ""
    hung: bool = False
    step: int = 0
    saved: int = 0
    outside: str = ""
    preempted: bool = False
    lost: tuple[str, ...] = ()


@dataclass
class Budget:
    """What a run may still fail, kept in its folder over requeues.

    Time limits and preemptions cost nothing. A crash costs one, and progress since the last one gives all back: a
    newer checkpoint, for steps that are made again and again are none.

    Attributes:
        crashes: failures since the run last advanced.
        furthest: the newest checkpoint's step when the run last failed.
        bad_nodes: hosts that are not to be used again.
        slow_nodes: hosts whose ranks compute slower than the others, and how many times.
        final: the exit code with which the run was given up, 0 while it was not: later jobs of a chain leave at once.
    """

    crashes: int = 0
    furthest: int = -1
    bad_nodes: list[str] = field(default_factory=list)
    slow_nodes: dict[str, float] = field(default_factory=dict)
    final: int = 0

    def failed(self, saved: int) -> int:
        """Count a failure after the checkpoint of step `saved`; returns how many there were without progress."""
        self.crashes = 1 if saved > self.furthest else self.crashes + 1
        self.furthest = max(self.furthest, saved)
        return self.crashes


@dataclass(frozen=True)
class Decision:
    """What the supervisor does next.

    Attributes:
        action: "finish" with `code`; "again" in the same place; "requeue"; "leave" the job to the scheduler, which is
            ending it or has queued it again already.
        why: a sentence for the log.
    """

    action: str
    code: int = 0
    why: str = ""


def charge(budget: Budget, saved: int, crashes: int, what: str, code: int) -> Decision:
    """Count a failure: another try in the same place, or the end with its own exit code.

    Args:
        saved: step of the newest checkpoint.
        crashes: failures without progress that are allowed.
        what: happened.
    """
    count = budget.failed(saved)
    if count > crashes:
        return Decision("finish", code or 1, f"{what} {count} times without progress: given up")
    return Decision("again", 0, f"{what}; failure {count} of at most {crashes} without progress")


def decide(ended: Ended, budget: Budget, crashes: int, requeue: bool) -> Decision:
    """The next action, in the order in which the facts count. Charges `budget` where the try failed.

    Args:
        crashes: failures without progress that are allowed.
        requeue: whether the job may queue itself again.
    """
    if ended.done or (ended.code == DONE and not ended.hung):
        return Decision("finish", DONE, "the training is finished" if ended.done else "the steps asked for are made")
    if ended.code in FINAL:
        why = "bad input" if ended.code == BAD_INPUT else "the run diverged"
        return Decision("finish", ended.code, f"{why}: another try would end the same way")
    if ended.wanted and ended.code == STOPPED:
        return Decision("finish", STOPPED, "stopped on request and saved")
    if ended.asked == "time":
        return _later(requeue, "the time limit is near")
    if ended.preempted and ended.outside == "RUNNING":
        return _later(requeue, "preempted")
    if ended.lost:
        return _later(requeue, f"lost {', '.join(ended.lost)}")
    if ended.asked == "term" or (ended.code == STOPPED and not ended.hung):
        return _asked_from_outside(ended, requeue)
    what = "hung" if ended.hung else f"failed with exit code {ended.code}"
    return charge(budget, ended.saved, crashes, what, ended.code)


def _later(requeue: bool, why: str) -> Decision:
    """Go on in another job: this one queued again, or the next of a chain."""
    if requeue:
        return Decision("requeue", 0, why)
    return Decision("finish", STOPPED, f"{why}; a later job of the chain goes on")


def _asked_from_outside(ended: Ended, requeue: bool) -> Decision:
    """The ranks stopped on somebody else's word: a person's, or the scheduler's.

    A cancelled job, and one that SLURM queues again by itself, are completing: to requeue these would bring a
    cancelled job back. Ranks stop by themselves too, before the known end of the job.
    """
    if ended.outside == UNKNOWN:  # a person's word would have left the file `stop`
        return _later(requeue, "the ranks stopped and saved, and the scheduler does not answer")
    if ended.outside == "RUNNING":
        return _later(requeue, "the ranks were asked to stop" if ended.asked else "the ranks stopped and saved")
    if ended.outside:
        return Decision("leave", STOPPED, f"stopped from outside, the job is {ended.outside}")
    if ended.code not in (DONE, STOPPED):  # on one machine: before they could save, or Ctrl-C insisted
        return Decision("finish", ended.code, f"asked to stop, and ended with exit code {ended.code}")
    return Decision("finish", STOPPED, "stopped on request and saved")
