"""`coatnet submit RECIPE --cluster local`: a run in the background of this machine."""

import json
import time
from dataclasses import replace
from pathlib import Path

from configs.errors import InputError
from configs.schema import Run
from slurm import job, local, scheduler, snapshot, status, submit
from trainer.commands.train import check_before_start, refuse_another_run, write_run


def submit_local(run: Run) -> int:
    """Check a run, write its folder, start `coatnet train` on it; returns the exit code.

    Raises:
        InputError: what `coatnet train` would refuse, or another process trains there.
    """
    from trainer import cluster  # imports torch: here are the devices

    check_before_start(run, cluster.local_ranks(run))
    folder = Path(run.folder)
    with submit.claimed(folder):
        if status.held(folder / "lock") or local.lives(scheduler.last_job(folder)):
            raise InputError(f"{folder}: another process trains here; wait for it, or choose another --name")
        refuse_another_run(folder, run)
        write_run(folder, replace(run, runs=str(Path(run.runs).resolve())))
        code = snapshot.take(folder / "code")
        place = folder / "submitit"
        words = ["trainer.cli", "train", str(folder.resolve() / "run.json")]
        number = local.send(place, words, code)
        told = {"jobs": [], "time": time.time(), "code": code.name, "logs": str(place.resolve())}
        job.write_whole(folder / "job.json", json.dumps({**told, **local.note(number)}, indent=1) + "\n")
    print(f"started process {number}: {folder}  (coatnet status {folder}, coatnet logs -f {folder})", flush=True)
    return 0
