"""The environment of a rank: what the supervisor sets for all of them, and what each task of a step adds.

`python -m slurm.rank MODULE ARGUMENT ...`, once per task, becomes the rank: names its place as torch.distributed reads
it, sets what its libraries need, and starts it. DeepSpeed looks for MPI where RANK is missing, so all of it is set
before anything is imported. Python 3.9 and the standard library only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import getpass
import importlib.metadata
import os
import runpy
import signal
import sys
import tempfile
import zlib
from pathlib import Path

from slurm import beat
from slurm.job import Job

# Each with its reason; the cluster profile's and the job's own environment win.
DEFAULTS = {
    "PYTHONUNBUFFERED": "1",
    "NCCL_DEBUG": "WARN",  # what NCCL has to say of a broken link
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # a failed collective ends the process without spoiling the recorder
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # which collective hangs: the flight recorder's last entries
    "TORCH_FR_BUFFER_SIZE": "20000",
}
# On processors glibc would give the activations' memory back after each step, and fault it in again in the next.
ON_CPU = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
# Not handed on: a place among the ranks of whoever submitted the job, and cores of a task, which srun is told anew.
LEFT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK")
LOWEST, PORTS = 20000, 12000  # ports of the rendezvous, below Linux's ephemeral range


def of_try(job: Job, name: str, given: dict[str, str], hosts: list[str], end: int = 0) -> dict[str, str]:
    """The variables that all ranks of a try are started with.

    Args:
        job: whose.
        name: of the try.
        given: the supervisor's own.
        hosts: the nodes, of which the first is where the ranks meet; none on a single machine.
        end: unix time at which the job ends, 0 where it is not known.
    """
    logs = Path(job.folder) / "logs"
    own = {
        **{variable: value for variable, value in given.items() if variable not in LEFT},
        **(ON_CPU if hosts and on_cpu(given) else {}),
        "TORCH_FR_DUMP_TEMP_FILE": f"{logs / name}.recorder.",  # the rank's number follows
        "NCCL_DEBUG_FILE": f"{logs / name}.nccl.%h.%p",
        **job.environment,
        "PYTHONPATH": os.pathsep.join(filter(None, (job.code, given.get("PYTHONPATH")))),
        "PYTHONSAFEPATH": "1",
        "COATNET_TRY": name,
        "COATNET_HEARTBEAT": str(beat.folder(job.folder, name)),
        "MASTER_PORT": str(LOWEST + zlib.crc32(name.encode()) % PORTS),  # another one for each try
    }
    if hosts:
        own["MASTER_ADDR"] = hosts[0]
    if end:
        own["SLURM_JOB_END_TIME"] = str(end)
    return own


def on_cpu(environment: dict[str, str]) -> bool:
    """Whether a job or a task of it has no GPUs."""
    names = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
    return not any(environment.get(name) for name in names)


def threads(environment: dict[str, str]) -> dict[str, str]:
    """OMP_NUM_THREADS: the cores of a task that computes on them, else 1: its loader processes have the cores."""
    return {"OMP_NUM_THREADS": environment.get("SLURM_CPUS_PER_TASK", "1") if on_cpu(environment) else "1"}


def place(environment: dict[str, str]) -> dict[str, str]:
    """RANK and its companions, from SLURM's words for a task of a step."""
    local = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": local,
    }


def caches(environment: dict[str, str]) -> dict[str, str]:
    """Folders of compiled code on this node's own disk, by user and versions: on shared disks builds meet and hang."""
    root = environment.get("COATNET_CACHE") or f"{tempfile.gettempdir()}/coatnet-{getpass.getuser()}"
    version = f"py{sys.version_info[0]}{sys.version_info[1]}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version += f"-torch{importlib.metadata.version('torch')}"
    names = {
        "TORCH_EXTENSIONS_DIR": "extensions",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }
    return {name: f"{root}/{version}/{folder}" for name, folder in names.items()}


def break_locks(folder: str) -> list[str]:
    """Remove locks that a killed build left in a folder of extensions: whoever meets one waits for ever.

    torch keeps the lock open while it builds, so one that no process has open is nobody's.
    """
    locks = [str(path) for path in Path(folder).glob("**/lock")]
    if not locks:
        return []
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            held.add(os.readlink(link))
    broken = [lock for lock in locks if os.path.realpath(lock) not in held]
    for lock in broken:
        with contextlib.suppress(FileNotFoundError):  # another rank was quicker
            os.unlink(lock)
    return broken


def main(arguments: list[str]) -> None:
    """Go on as the rank: `arguments` are its module and what follows `python -m MODULE`."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where it hangs if it does so before it can tell itself
    given = dict(os.environ)
    own = {**DEFAULTS, **caches(given), **threads(given)}
    os.environ.update({**own, **given, **place(given)})
    for lock in break_locks(os.environ["TORCH_EXTENSIONS_DIR"]):
        print(f"removed a stale lock: {lock}", file=sys.stderr)
    if os.environ.get("RANK") == "0":
        names = sorted([*own, "MASTER_ADDR", "MASTER_PORT", "TORCH_FR_DUMP_TEMP_FILE", "NCCL_DEBUG_FILE"])
        names += sorted(name for name in os.environ if name.startswith("NCCL_") and name not in names)
        shown = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        print(f"environment of the ranks: {shown}", flush=True)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
