"""Facts about the machine and the software of a run, for its folder, its checkpoints and bench records."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "numpy", "safetensors", "mlflow", "timm")


def versions() -> dict[str, str]:
    """Versions of the packages that matter and are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with `+` behind it when files differ from it; `unknown` outside a checkout.

    Of a job's own copy of the code that of the checkout it was copied from.
    """
    root = Path(__file__).parents[2]
    if (root / "SNAPSHOT").exists():
        return (root / "SNAPSHOT").read_text().strip()
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cpu_model() -> str:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(device: str) -> dict[str, Any]:
    """Everything a record of this run should carry."""
    return {
        "device": device,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "versions": versions(),
        "commit": commit(),
    }


def place() -> dict[str, str]:
    """Where this process runs, as far as a scheduler says: host, job, cluster."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}" if array else os.environ.get("SLURM_JOB_ID", "")
    return {"host": platform.node(), "job": job, "cluster": os.environ.get("SLURM_CLUSTER_NAME", "")}
