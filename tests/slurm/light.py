"""A rank that trains nothing: it keeps the contract with the supervisor, and starts in a moment.

`python -m slurm.rank tests.slurm.light FOLDER STEPS MODE`. Steps are counted in FOLDER; each takes 0.2 s. MODE is
nothing, "deaf" to requests to stop, "never starts", or "slow": the guard finds the last rank slow, and a rank fails.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

STOPPED = 75


def main(folder: Path, steps: int, mode: str) -> int:
    """Count steps; the exit code of the trainer's contract."""
    first, wanted = os.environ["RANK"] == "0", []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: wanted.append(1))
    if mode == "never starts":
        time.sleep(0.5 * int(os.environ["RANK"]))
        return 9
    counter = folder / "steps.jsonl"
    step = len(counter.read_text().splitlines()) if counter.exists() else 0
    while step < steps:
        time.sleep(0.2)
        step += 1
        if first:
            with counter.open("a") as file:
                file.write(json.dumps({"step": step, "try": os.environ["COATNET_TRY"], "time": time.time()}) + "\n")
            saved = folder / "checkpoints" / f"step-{step:08d}"
            saved.mkdir(parents=True, exist_ok=True)
            (saved / "COMPLETE").touch()
        beats = Path(os.environ["COATNET_HEARTBEAT"])
        told = {"time": time.time(), "moves": step, "step": step, "phase": "train", "longest": 0.2}
        (beats / f"{socket.gethostname()}.tmp").write_text(json.dumps(told))
        (beats / f"{socket.gethostname()}.tmp").replace(beats / f"{socket.gethostname()}.json")
        if mode == "slow" and step == 3 and os.environ["WORLD_SIZE"] != "1":
            verdict = {"event": "guard", "of": "slow_rank", "rank": [int(os.environ["WORLD_SIZE"]) - 1], "times": 3.0}
            with (folder / "events" / "rank-00000.jsonl").open("a") as file:
                file.write(f"{json.dumps(verdict)}\n" * 3)
            return 9
        if wanted and mode != "deaf":
            return STOPPED
    if first:
        (folder / "done").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
