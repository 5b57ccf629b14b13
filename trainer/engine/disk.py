"""State on a local disk, under `parallel.offload nvme`: what must be there before a run, and the average's files.

DeepSpeed keeps weights and AdamW's state in files of its own beside these, see
`trainer.engine.deepspeed_config.folder`.
"""

import contextlib
import ctypes.util
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import InputError
from configs.schema import Run
from trainer import cluster
from trainer.engine import deepspeed_shims
from trainer.engine.deepspeed_config import ALIGNED, folder
from trainer.launch import with_rooms

# Of glibc's mallopt, and its own value for both: `trainer.launch` raises them for ranks that compute on a CPU.
TRIM_THRESHOLD, MMAP_THRESHOLD, PLAIN = -1, -3, 128 << 10
INSTALL = "apt-get install g++ libaio-dev python3-dev"
PATIENCE = 1800  # seconds that compiling may take


def keep_no_memory(run: Run) -> None:
    """Let the C library of a run that keeps its state on a disk give back at once what is freed.

    Kept for the next step it is faster, and more than half of what such a run takes (record `offload`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if run.parallel.offload == "nvme" and mallopt is not None:
        mallopt(MMAP_THRESHOLD, PLAIN)
        mallopt(TRIM_THRESHOLD, PLAIN)


def check(run: Run, needed: int) -> None:
    """Refuse a run whose state cannot go to the disk, before anything starts.

    Args:
        needed: bytes of all ranks of this machine.

    Raises:
        InputError: what is missing, and what would do.
    """
    missing = [name for name, there in _tools().items() if not there]
    if missing:
        raise InputError(
            f"parallel.offload = 'nvme': DeepSpeed compiles its transfers at the first start, and there is no "
            f"{', no '.join(missing)}; {INSTALL}; nearest valid: 'cpu'"
        )
    path = Path(run.parallel.offload_path)
    where = f"parallel.offload_path = {str(path)!r}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        _check_direct(path)
    except OSError as error:
        raise InputError(
            f"{where}: cannot be written past the system's cache ({error}); nearest valid: a folder on a local disk"
        ) from None
    free = shutil.disk_usage(path).free + _used(folder(run))
    if free < needed:
        raise InputError(
            f"{where}: the ranks of this machine need {needed / 1e9:.1f} GB there, {free / 1e9:.1f} are free; nearest "
            f"valid: a folder on a larger disk"
        )


def prepare(run: Run) -> None:
    """Compile DeepSpeed's transfers before the ranks start, of which each would try; once for a machine.

    Raises:
        InputError: it cannot be compiled, with the compiler's words.
    """
    code = f"import os; os.environ['DS_ACCELERATOR'] = '{cluster.device_kind(run)}'\n"
    code += "from trainer.engine import deepspeed_shims\ndeepspeed_shims.begin()\ndeepspeed_shims.build_disk()"
    sys.stderr.write("parallel.offload nvme: DeepSpeed's transfers, compiled once for a machine (some minutes) ...\n")
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, env=with_rooms(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"parallel.offload = 'nvme': was not compiled within {PATIENCE} s; does another process, or one that was "
            f"killed, hold the file `lock` in a folder async_io of TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions?"
        ) from None
    if done.returncode:
        told = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise InputError(f"parallel.offload = 'nvme': cannot be compiled; {INSTALL}; nearest valid: 'cpu'\n{told}")


def load(run: Run) -> None:
    """Compile or load the transfers on the first rank of a machine, before others wait for it in a collective."""
    if run.parallel.offload == "nvme" and cluster.local_rank() == 0:
        os.environ["DS_ACCELERATOR"] = cluster.device_kind(run)
        deepspeed_shims.begin()
        deepspeed_shims.build_disk()


def _tools() -> dict[str, bool]:
    """What compiling takes, and whether it is there."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    places = [Path(place) for place in os.environ.get("CPATH", "").split(os.pathsep) if place]
    places += [Path("/usr/include"), Path("/usr/local/include")]
    return {
        "C++ compiler": compiler is not None,
        "libaio.h": any((place / "libaio.h").is_file() for place in places),
        "libaio": ctypes.util.find_library("aio") is not None or bool(os.environ.get("LIBRARY_PATH")),
        "Python.h": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }


def _check_direct(path: Path) -> None:
    """Write a block past the system's cache, change it by a view of the file, and read it as DeepSpeed will.

    Raises:
        OSError: the file system takes no such transfer, or does not keep both in step.
    """
    with tempfile.NamedTemporaryFile(dir=path) as file, mmap.mmap(-1, ALIGNED) as block:
        block[:] = b"a" * ALIGNED
        direct = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        try:
            os.pwrite(direct, block, 0)
            with mmap.mmap(direct, ALIGNED) as view:
                seen = view[:1]
                view[1:2] = b"b"
                os.preadv(direct, [block], 0)
                if seen != b"a" or block[:3] != b"aba":
                    raise OSError("views of a file and direct transfers disagree")
        finally:
            os.close(direct)


def _used(path: Path) -> int:
    """Bytes of the files below a folder: of an earlier attempt, which this one overwrites."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def keeper(run: Run, rank: int) -> Callable[[Tensor], Tensor]:
    """A function that copies a tensor (1-D fp32) into a new file of this rank's and returns a view of that."""
    place = _of_rank(run, rank)[0]
    place.mkdir(parents=True, exist_ok=True)
    number = 0

    def copied(value: Tensor) -> Tensor:
        nonlocal number
        number += 1
        path = place / f"{number}.average"
        return torch.from_file(str(path), shared=True, size=value.numel(), dtype=torch.float32).copy_(value)

    return copied


def clear(run: Run, rank: int) -> None:
    """Delete this rank's files: those of an attempt that was killed, or at the end."""
    for place in _of_rank(run, rank) if run.parallel.offload == "nvme" else ():
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # the last rank to leave finds them empty
            for above in takewhile(lambda one: one != Path(run.parallel.offload_path), place.parents):
                above.rmdir()


def _of_rank(run: Run, rank: int) -> tuple[Path, ...]:
    """The folders that hold this rank's state: ours, and where DeepSpeed puts AdamW's parts and the weights."""
    places = ("average", "zero_stage_3/optimizer", "zero_stage_3/float32params")
    return tuple(folder(run) / place / f"rank{rank}" for place in places)
