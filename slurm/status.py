"""What becomes of a run, from its folder and, where it is a job, from the scheduler; works for runs without one too.

How far its training is, `trainer/tracking/live.py` reads.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from configs.errors import InputError
from slurm import beat, local, scheduler
from slurm.events import Reader, tail

QUIET = 60.0  # seconds without a step from which on that is said
SHOWN = 5  # events
LONG = 1 << 20  # bytes of the first rank's events: the last start may be many saves ago
TOLD = ("clock", "origin")  # events that say nothing to a person


def facts(folder: Path, reader: Reader | None = None, shown: list[Any] | None = None) -> dict[str, Any]:
    """What is known of a run, for programs; `slurm/page.py` makes it readable.

    Args:
        folder: the run's.
        reader: of its events, kept between two calls; None: a new one.
        shown: the events that the last call ended with, kept with it.
    """
    told = [*(shown or []), *(event for event in (reader or Reader(folder)).new() if event.get("event") not in TOLD)]
    if shown is not None:
        shown[:] = told[-SHOWN:]
    own = tail(folder / "events" / "rank-00000.jsonl", LONG)
    agent = tail(folder / "events" / "agent.jsonl")
    jobs, problem = _jobs(folder)
    beats = _beats(folder)
    return {
        "run": str(folder),
        **_state(folder, jobs, own, agent, beats),
        "jobs": jobs,
        "scheduler": problem,
        "job_nodes": next((event["nodes"] for event in reversed(agent) if event["event"] == "try"), []),
        "try": next((event["try"] for event in reversed(agent) if event["event"] == "try"), ""),
        **_budget(folder),
        **_place(own),
        "scores": _last_scores(own),
        "events": told[-SHOWN:],
    }


def _jobs(folder: Path) -> tuple[dict[str, str], str]:
    """States of the run's jobs as the scheduler has them, and what went wrong with asking."""
    named = scheduler.last_job(folder).get("jobs", [])
    found: dict[str, str] = {}
    try:
        for job in named if isinstance(named, list) else []:
            found |= {name: state.removesuffix(" None") for name, state in scheduler.states(str(job)).items()}
    except InputError as error:
        return found, str(error)
    return found, ""


def _beats(folder: Path) -> dict[str, Any]:
    """The signs of life of the newest try: when the last one came, the phase, and the furthest step."""
    tries = [path for path in (folder / "heartbeat").glob("*") if path.is_dir()]
    if not tries:
        return {}
    newest = max(tries, key=lambda path: path.stat().st_mtime)
    nodes = beat.scan(newest)
    if not nodes:
        return {}
    times = [path.stat().st_mtime for path in newest.glob("*.json")]
    slowest = min(nodes.values(), key=lambda one: one.moves)
    return {"time": max(times, default=0.0), "phase": slowest.phase, "step": max(one.step for one in nodes.values())}


def _state(
    folder: Path,
    jobs: dict[str, str],
    own: list[dict[str, Any]],
    agent: list[dict[str, Any]],
    beats: dict[str, Any],
) -> dict[str, Any]:
    """One word for the run's state, and what there is to say about it."""
    if (folder / "done").exists():
        return {"state": "done", "why": "the training is finished"}
    waiting = {job: state for job, state in jobs.items() if not scheduler.over(state)}
    running = [job for job, state in waiting.items() if not state.startswith("PENDING")]
    if running or held(folder / "lock") or local.lives(scheduler.last_job(folder)):
        silent = time.time() - beats["time"] if beats else 0.0
        why = f"at {beats['phase']}" + (f", step {beats['step']:,}" if beats["step"] else "") if beats else "starting"
        if beats and beats["phase"] == "train" and silent > QUIET:
            why = f"nothing moved for {silent:.0f} s"
        return {"state": "running", "why": why}
    if waiting:
        return {"state": "queued", "why": ", ".join(sorted({state.partition(" ")[2] for state in waiting.values()}))}
    ends = [event for event in own if event["event"] in ("stop", "diverged", "end")]
    decided = [event for event in agent if event["event"] == "decide"]
    if decided and decided[-1]["action"] == "finish" and decided[-1]["code"] not in (0, 75, 77):
        return {"state": "failed", "why": f"exit code {decided[-1]['code']}: {decided[-1]['why']}"}
    if ends and ends[-1]["event"] == "diverged":
        return {"state": "diverged", "why": "another try would end the same way"}
    if ends:
        return {"state": "stopped", "why": ends[-1].get("reason") or "the steps asked for are made"}
    known = ", ".join(f"job {job} {state}" for job, state in jobs.items())
    return {"state": "not running", "why": known or "no process holds it"}


def held(lock: Path) -> bool:
    """Whether a process of this machine holds a file's lock; taking it to find out would get in somebody's way."""
    try:
        status = lock.stat()
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any("FLOCK" in line and place in line.split() for line in locks.splitlines())


def _budget(folder: Path) -> dict[str, Any]:
    """Failures without progress, and nodes that are left out, or are where there are others."""
    try:
        told = json.loads((folder / "agent" / "budget.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        told = {}
    bad, slow = list(told.get("bad_nodes", [])), dict(told.get("slow_nodes", {}))
    return {"crashes": int(told.get("crashes", 0)), "bad_nodes": bad, "slow_nodes": slow}


def _place(own: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the run computes, and what is saved."""
    begun: dict[str, Any] = next((event for event in reversed(own) if event["event"] in ("start", "resume")), {})
    saved = next((event for event in reversed(own) if event["event"] == "save"), None)
    last = {"step": saved["of_step"], "time": saved["time"]} if saved is not None else None
    return {"last_save": last, "world": begun.get("world"), "device": begun.get("device")}


def _last_scores(own: list[dict[str, Any]]) -> dict[str, float]:
    """The scores of the last evaluation."""
    scored = [event for event in own if event["event"] == "evaluation"]
    return {name: value for name, value in scored[-1].items() if name.startswith("eval")} if scored else {}
