"""Whether this node is fit for a run: clock, disks, shared memory, code, GPUs; which of many is unlike the others.

`coatnet doctor --node` runs it as a job step on every node before the ranks start. What only one node can get wrong is
bad and leaves it out; what is the same everywhere, such as a slow shared disk, is a warning, or a job would lose all
its nodes to it. Python 3.9 and the standard library only.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from configs.finding import Finding

SKEW = 2.0  # seconds that a node's clock may be behind the supervisor's
LATE = 600.0  # seconds that a step may take to start: a clock further ahead than that is wrong
FACTS = "facts: "  # begins the line with what must be the same on all nodes
PACKAGES = ("torch", "torchvision", "deepspeed", "numpy", "safetensors", "webdataset", "pillow", "triton", "mlflow")
BLOCK = 1 << 20
INODES = 10_000  # files that must still fit


@dataclass(frozen=True)
class Needs:
    """What a run wants from a node.

    Attributes:
        folder: the run's, on shared disk.
        scratch: folder on the node's own disk, for caches and compiled code.
        code: where the run's copy of the code lies.
        free_bytes: for checkpoints in `folder`.
        scratch_bytes: for the cache in `scratch`.
        shm_bytes: for batches on their way from the loader's processes, in /dev/shm.
        gpus: that the ranks of a node take; 0: none.
        asked_at: unix time of the supervisor when it started the check; 0: unknown.
    """

    folder: str
    scratch: str
    code: str
    free_bytes: int = 0
    scratch_bytes: int = 1 << 30
    shm_bytes: int = 0
    gpus: int = 0
    asked_at: float = 0.0


def examine(needs: Needs) -> list[Finding]:
    """All checks of this node that need no library."""
    found = [clock(needs.asked_at)]
    found += disk("run folder", needs.folder, needs.free_bytes, 16 * BLOCK)
    found += disk("scratch", needs.scratch, needs.scratch_bytes, 64 * BLOCK)
    found += [shared_memory(needs.shm_bytes), reachable_code(needs.code)]
    return found + (gpus(needs.gpus, nvidia_smi()) if needs.gpus else [])


def clock(asked_at: float, now: float | None = None) -> Finding:
    """This node's clock beside the supervisor's, and whether a time server keeps it."""
    now = time.time() if now is None else now
    if asked_at and now < asked_at - SKEW:
        said = f"{asked_at - now:.1f} s behind the node of the supervisor"
        return Finding("clock", "bad", said, "start chronyd or ntpd on this node; leave it out until then")
    if asked_at and now > asked_at + LATE:
        said = f"{now - asked_at:.0f} s ahead of the node of the supervisor, or the step took so long to start"
        return Finding("clock", "bad", said, "start chronyd or ntpd on this node; leave it out until then")
    kept, error = _kept_clock()
    if kept is False:
        return Finding("clock", "note", "no time server keeps it", "times in logs of several nodes may not compare")
    known = f"kept by a time server to {error * 1000:.1f} ms" if kept else "plausible"
    return Finding("clock", "good", known)


def _kept_clock() -> tuple[bool | None, float]:
    """Whether the kernel counts its clock as synchronised, and its largest error in seconds; None: it does not say."""
    buffer = ctypes.create_string_buffer(512)  # struct timex of adjtimex(2), all zero: only read
    try:
        state = ctypes.CDLL(None).adjtimex(buffer)
    except (AttributeError, OSError):
        return None, 0.0
    if state < 0:
        return None, 0.0
    unsynchronised = 5  # TIME_ERROR
    return state != unsynchronised, int.from_bytes(buffer.raw[24:32], "little", signed=True) / 1e6  # maxerror


def disk(name: str, folder: str, need: int, test: int) -> list[Finding]:
    """Room and speed of a folder's disk.

    Args:
        name: what the folder is for.
        folder: must exist, or be makeable.
        need: bytes that must be free.
        test: bytes that are written to measure it; 0 measures nothing.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        free, state = shutil.disk_usage(folder).free, os.statvfs(folder)
        speed = write_speed(folder, test) if test else 0.0
    except OSError as error:
        return [Finding(name, "bad", f"{folder}: {error.strerror or error}", "mount it, or give the right path")]
    if free < need:
        said = f"{free / 1e9:.1f} GB free in {folder}, {need / 1e9:.1f} GB are needed"
        return [Finding(name, "bad", said, "make room, or choose another folder (--runs, --data.cache)")]
    if state.f_files and state.f_favail < INODES:
        return [Finding(name, "bad", f"room for {state.f_favail} more files only in {folder}", "delete small files")]
    said = f"{free / 1e9:.1f} GB free in {folder}" + (f", {speed / 1e6:.0f} MB/s written and synced" if test else "")
    if test and speed < 20e6:
        return [Finding(name, "warning", said, "saves will take long: --checkpoint.every larger, or a faster disk")]
    return [Finding(name, "good", said)]


def write_speed(folder: str, size: int) -> float:
    """Bytes per second that reach a folder's disk.

    Raises:
        OSError: it cannot be written.
    """
    path = os.path.join(folder, f".speed-{platform.node()}-{os.getpid()}")
    block = os.urandom(BLOCK)  # a disk may compress or share what repeats within a block
    try:
        began = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(max(1, size // BLOCK)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - began)
    finally:
        if os.path.exists(path):
            os.unlink(path)


def shared_memory(need: int, path: str = "/dev/shm") -> Finding:
    """Room in shared memory, through which the loader's processes hand their batches over."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding("shared memory", "bad", f"{path}: {error.strerror}", "mount a tmpfs there")
    if free < need:
        said = f"{free / 1e6:.0f} MB free in {path}, about {need / 1e6:.0f} MB are needed"
        advice = "start the container with --ipc=host or a larger --shm-size, or take fewer --data.workers"
        return Finding("shared memory", "bad", said, advice)
    return Finding("shared memory", "good", f"{free / 1e6:.0f} MB free in {path}")


def reachable_code(folder: str) -> Finding:
    """Whether the run's copy of the code can be read here."""
    try:
        digest = code_digest(folder)
    except OSError as error:
        said = f"{error.filename or folder}: {error.strerror or error}"
        return Finding("code", "bad", said, "the run's folder must lie on a disk that all nodes share")
    return Finding("code", "good", f"{folder}, {digest}")


def code_digest(folder: str) -> str:
    """Twelve hex digits over all Python files below a folder's rooms.

    Raises:
        OSError: one cannot be read, or there is none.
    """
    digest = hashlib.sha256()
    files = sorted(path for room in Path(folder).iterdir() if room.is_dir() for path in room.rglob("*.py"))
    if not files:
        raise FileNotFoundError(2, "no code there", folder)
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def nvidia_smi() -> str | None:
    """What nvidia-smi tells of each GPU: name, uncorrected errors, failed row remapping; None where it fails."""
    query = "name,ecc.errors.uncorrected.volatile.total,remapped_rows.failure,remapped_rows.pending"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def gpus(wanted: int, told: str | None) -> list[Finding]:
    """Number and health of the GPUs.

    Args:
        wanted: that the ranks take.
        told: by `nvidia_smi`.
    """
    if told is None:
        return [Finding("GPUs", "bad", "nvidia-smi does not answer", "reset the node; see `dmesg | grep -i xid`")]
    cards = [[word.strip() for word in line.split(",")] for line in told.splitlines() if line.strip()]
    if len(cards) < wanted:
        said = f"{len(cards)} of {wanted} GPUs are there"
        return [Finding("GPUs", "bad", said, "a GPU that fell off the bus comes back with a reboot")]
    found = [Finding("GPUs", "good", ", ".join(sorted({card[0] for card in cards})) + f" x {len(cards)}")]
    for number, (_, errors, failed, pending) in enumerate(cards):
        if errors.isdecimal() and int(errors):
            said = f"GPU {number}: {errors} uncorrected memory errors since the last reset"
            found.append(Finding("ECC", "bad", said, "drain the node and reset the GPU"))
        if failed.lower() in ("yes", "1"):
            found.append(Finding("ECC", "bad", f"GPU {number}: a row could not be remapped", "have the GPU replaced"))
        elif pending.lower() in ("yes", "1"):
            said = f"GPU {number}: rows wait to be remapped"
            found.append(Finding("ECC", "warning", said, "reset the GPU when the node is free"))
    return found


def facts(needs: Needs) -> dict[str, str]:
    """What must be the same on all nodes of a run."""
    told = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            told[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        told["code"] = code_digest(needs.code)
    except OSError:
        told["code"] = "cannot be read"
    cards = (nvidia_smi() or "").splitlines() if needs.gpus else []
    if cards:
        told["GPU"] = ", ".join(sorted({card.split(",")[0].strip() for card in cards}))
    return told


def odd(reports: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """Nodes that differ from the others, each with how; the majority counts, and among equals the first node's side.

    Args:
        reports: what each node printed, with a line of `FACTS` in it.
        hosts: the nodes in their order.
    """
    told: dict[str, dict[str, str]] = {}
    for host in hosts:
        lines = [line for line in reports.get(host, "").splitlines() if line.startswith(FACTS)]
        if lines:
            told[host] = json.loads(lines[-1][len(FACTS) :])
    found: dict[str, list[str]] = {}
    for key in sorted({key for own in told.values() for key in own}):
        values = [own.get(key, "none") for own in told.values()]
        usual = collections.Counter(values).most_common(1)[0][0]  # the first of those that are equally frequent
        for host, own in told.items():
            if own.get(key, "none") != usual:
                found.setdefault(host, []).append(f"{key} is {own.get(key, 'none')}, elsewhere {usual}")
    return {host: "; ".join(words) for host, words in found.items()}
