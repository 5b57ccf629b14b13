"""CoAtNet-5 with its state on a disk beside the same steps in memory, by the whole road, and what memory it took."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.launch import with_rooms

RECIPE = "coatnet5-jft300m-224"
# A rate at which an update shows in the next loss. fp32, so that a difference is not one of rounding.
STEPS = 3
COMMON = """--data.synthetic --data.workers 0 --tracking.no-mlflow --tracking.log-every 1 --cluster.device cpu
    --precision.dtype fp32 --parallel.recompute full --optim.steps 100 --optim.warmup-steps 1
    --optim.lr 1e-3"""
REAL = "--cluster.ranks 1 --data.global-batch 4 --norm.replica-batch 2 --parallel.micro-batch 2"
# Of every width and the fewest blocks: 100 M of the 688 M parameters, over two ranks.
SMALL = """--cluster.ranks 2 --data.global-batch 8 --norm.replica-batch 4 --parallel.micro-batch 2 --model.resolution 64
    --model.depths 2 1 1 2 1 --optim.ema 0.9"""
ON_DISK, IN_MEMORY = "--parallel.zero 3 --parallel.offload nvme", "--parallel.zero 0"
LIMIT = 14 << 30  # bytes that the steps of the real size may take
GROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Trained:
    """What a few steps came to.

    Attributes:
        losses, norms: of every step.
        peak: bytes of the command and all its processes together at most, sampled; pages of files, which the system
            takes back when it wants them, do not count.
        disk: bytes in the folder for the state at most.
        seconds: of each step but the first.
    """

    losses: list[float]
    norms: list[float]
    peak: int
    disk: int
    seconds: list[float]


def trained(words: str, folder: Path, steps: int = STEPS, room: "Room | None" = None) -> Trained:
    """Take the steps.

    Args:
        words: of the command line, after those of all runs.
        folder: for the run, and for its state.
        room: in which the command has to live.

    Raises:
        RuntimeError: the command failed, with what it said.
    """
    disk = folder / "disk"
    command = [sys.executable, "-m", "trainer.cli", "train", RECIPE, "--runs", str(folder)]
    command += f"{COMMON} --steps {steps} {words}".split()
    if "nvme" in words:
        command += ["--parallel.offload-path", str(disk)]
    if room is not None:
        command = ["sh", "-c", f'echo $$ > {room.folder}/cgroup.procs && exec "$@"', "sh", *command]
    folder.mkdir(parents=True, exist_ok=True)
    peak = held = 0
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, env=with_rooms(), stdout=said, stderr=said, start_new_session=True)
        while process.poll() is None:
            peak = max(peak, sum(map(_resident, _family(process.pid))))
            held = max(held, sum(_size(path) for path in disk.rglob("*")))
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError((folder / "said").read_text()[-4000:])
    (run,) = folder.glob("*/metrics.jsonl")
    rows = [row for row in map(json.loads, run.read_text().splitlines()) if "train/loss" in row]
    times = [row["time"] for row in rows]
    shutil.rmtree(disk, ignore_errors=True)
    return Trained(
        [row["train/loss"] for row in rows],
        [row["train/grad_norm"] for row in rows],
        peak,
        held,
        [after - before for before, after in pairwise(times)],
    )


def _family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from _family(int(child))
    except OSError:
        return


def _resident(pid: int) -> int:
    """Bytes of a process in memory that are no file's; 0 of one that is gone."""
    try:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return 1024 * sum(int(rows[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    except (OSError, KeyError):
        return 0


class Room:
    """A control group of the kernel (version 1), made by root: the memory that all its processes may take together.

    Pages of files are counted in; the kernel takes them back where there is no room.
    """

    def __init__(self, limit: int) -> None:
        self.folder = GROUPS / f"coatnet-{os.getpid()}"
        self._limit = limit

    @staticmethod
    def possible() -> bool:
        """Whether this process may make one."""
        return os.access(GROUPS / "cgroup.procs", os.W_OK)

    def __enter__(self) -> "Room":
        self.folder.mkdir()
        (self.folder / "memory.limit_in_bytes").write_text(str(self._limit))
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()


def _size(path: Path) -> int:
    """Bytes of a file; 0 of one that is gone, and of a folder."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
