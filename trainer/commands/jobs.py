"""`coatnet logs|cancel|requeue RUN`: what to do with a run that was submitted. Never imports torch."""

import os
import sys
import time
from pathlib import Path

from configs.errors import InputError
from slurm import local, scheduler
from slurm.status import held
from trainer.commands.config import Arguments
from trainer.commands.status import run_folder
from trainer.tracking.journal import whole_lines

LOOK = 5.0  # seconds between two questions to the scheduler


def cancel_command(arguments: list[str]) -> int:
    """`coatnet cancel RUN [--now]`: returns the exit code."""
    parser = Arguments("cancel", "Ends a run's job: it saves and leaves. Submitted again, the run goes on.")
    parser.add_argument("run")
    parser.add_argument("--now", action="store_true", help="at once, without a save")
    options = parser.parse_strict(arguments)
    folder = run_folder(options.run)
    jobs = scheduler.live(folder)
    if not jobs and _runs_here(folder):
        if options.now:
            raise InputError(f"{folder}: runs here without SLURM; --now is for jobs, press Ctrl-C twice where it runs")
        (folder / "stop").touch()
        print(f"{folder}: asked to save and leave at the next step")
        return 0
    if not jobs:
        print(f"{folder}: no job waits or runs")
        return 0
    waiting = [name for name in jobs if _waits(name)]
    for name in jobs if options.now else waiting:
        scheduler.ask("scancel", name)
        print(f"cancelled job {name}")
    if not options.now and len(waiting) < len(jobs):
        (folder / "stop").touch()
        print(f"{folder}: asked to save and leave at the next step; --now does not wait for that")
    return 0


def requeue_command(arguments: list[str]) -> int:
    """`coatnet requeue RUN`: returns the exit code."""
    parser = Arguments("requeue", "Has a run's job save, leave and be queued again, now.")
    parser.add_argument("run")
    folder = run_folder(parser.parse_strict(arguments).run)
    running = [name for name in scheduler.live(folder) if not _waits(name)]
    if not running:
        raise InputError(f"{folder}: no job runs; `coatnet submit` starts one that continues the run")
    for name in running:
        scheduler.ask("scancel", "--batch", "--signal=USR2", name)
        print(f"job {name}: asked to save and to be queued again")
    return 0


def _waits(name: str) -> bool:
    """Whether a job is still in the queue, or in it again."""
    return all(state.startswith("PENDING") for state in scheduler.states(name).values())


def _runs_here(folder: Path) -> bool:
    """Whether the run goes on on this machine without SLURM: in a terminal, or by --cluster local."""
    return held(folder / "lock") or local.lives(scheduler.last_job(folder))


def logs_command(arguments: list[str]) -> int:
    """`coatnet logs RUN [-f] [--rank R]`: returns the exit code."""
    parser = Arguments("logs", "Shows the newest logs of a run: the supervisor's and a rank's.")
    parser.add_argument("run")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as they grow, through restarts too")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--lines", type=int, default=40, help="of each log's end, at first")
    options = parser.parse_strict(arguments)
    folder = run_folder(options.run)
    shown: dict[Path, int] = {}
    asked = time.monotonic()
    while True:
        newest = newest_logs(folder, options.rank)
        if not newest and not options.follow:
            raise InputError(
                f"{folder}: no logs of rank {options.rank}; `coatnet status {folder}` says what it waits for"
            )
        for path in newest:
            _show_new(path, shown, options.lines)
        if not options.follow or ((folder / "job.json").exists() and asked < 0):
            return 0
        time.sleep(1)
        if time.monotonic() - asked > LOOK:
            asked = time.monotonic() if _goes_on(folder) else -1.0  # the last words may just be written: look once more


def _goes_on(folder: Path) -> bool:
    """Whether there may be more logs; of a run on this machine nobody knows."""
    return not (folder / "job.json").exists() or _runs_here(folder) or bool(scheduler.live(folder))


def newest_logs(folder: Path, rank: int) -> list[Path]:
    """The job's own log, and the output and errors of a rank in its newest try; empty ones are left out."""
    told = scheduler.last_job(folder)
    names = [*told.get("jobs", []), *([told["process"]] if "process" in told else [])]
    own = [path for name in names for path in Path(told["logs"]).glob(f"{name}_0_log.*")]
    tries = sorted((folder / "logs").glob(f"*.{rank}.out"), key=os.path.getmtime)[-1:]
    ranks = [path.with_suffix(suffix) for path in tries for suffix in (".out", ".err")]
    ranks += [folder / "logs" / f"rank-{rank:05d}.log"]  # of a run on this machine
    return [path for path in [*sorted(own), *ranks] if path.exists() and path.stat().st_size]


def _show_new(path: Path, shown: dict[Path, int], lines: int) -> None:
    """Print what a log has gained; at first its last lines."""
    with path.open("rb") as file:
        if path not in shown:
            new = b"".join(file.read().splitlines(keepends=True)[-lines:])
            sys.stdout.write(f"==> {path} <==\n")
        else:
            file.seek(shown[path])
            new = file.read()
        shown[path] = file.tell()
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()


def report_check(folder: Path, job: str) -> int:
    """Wait for the job of `coatnet submit --check` and say whether the run fits and how fast it is.

    Returns:
        0, or the exit code with which it failed.
    """
    said = ""
    while not scheduler.over(state := " ".join(scheduler.states(job).values()) or "COMPLETED"):
        if state != said:
            print(f"job {job}: {state}; Ctrl-C leaves it alone", flush=True)
            said = state
        time.sleep(LOOK)
    decisions = [row for row in whole_lines(folder / "events" / "agent.jsonl") if row["event"] == "decide"]
    code = int(decisions[-1]["code"]) if decisions else 1
    figures = [row for row in whole_lines(folder / "metrics.jsonl") if "perf/images_per_second" in row]
    if code or not figures:
        print(f"it does not run: {decisions[-1]['why'] if decisions else state}")
        for path in newest_logs(folder, 0):
            _show_new(path, {}, 20)
        return code or 1
    last = figures[-1]
    mfu = f", MFU {last['perf/mfu']:.1%}" if "perf/mfu" in last else ""
    print(
        f"it fits: {last['memory/peak_bytes'] / 1e9:.2f} GB at most on the first rank\n"
        f"speed: {last['perf/images_per_second']:.1f} images/s, "
        f"{last['perf/images_per_second_per_device']:.1f} a device{mfu}; "
        f"{last['data/wait_fraction']:.1%} of the time waiting for data (made-up pictures)\n"
        f"run folder: {folder}"
    )
    return 0
