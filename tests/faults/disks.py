"""Disks that fail: without power, without room, without the right to write, slow. All real ones, mounted for a test.

Power: ext4's own request for such tests stops every read and write and forgets what was not forced to the disk. Slow:
the kernel's throttle on a loop device, for the processes of a control group.
"""

import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 60.0  # seconds until nobody uses a disk any more
GROUPS = Path("/sys/fs/cgroup/blkio")
SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32) of linux/fs: ext4, XFS and F2FS know it
NOTHING_MORE = 2  # not even the journal is written


class Disk:
    """A file system in a file; needs root and a loop device."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.image, self.path = folder / "image", folder / "disk"
        self.path.mkdir(exist_ok=True)
        with self.image.open("wb") as file:
            file.truncate(megabytes << 20)
        command("mkfs.ext4", "-q", "-F", str(self.image))
        self.mount()

    def mount(self, *options: str) -> None:
        """Make it visible; the journal brings it to where it was when the power went."""
        command("mount", "-o", ",".join(("loop", *options)), str(self.image), str(self.path))

    def cut(self) -> None:
        """Power goes."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", NOTHING_MORE))
        finally:
            os.close(handle)

    def unmount(self) -> None:
        """Make it invisible, as soon as nobody uses it."""
        unmount(self.path)

    @property
    def device(self) -> str:
        """The device's numbers, "7:0" for example."""
        done = subprocess.run(["findmnt", "-n", "-o", "MAJ:MIN", str(self.path)], capture_output=True, text=True)
        return done.stdout.strip()


def unmount(path: Path) -> None:
    """Undo a mount, as soon as nobody uses it."""
    deadline = time.monotonic() + PATIENCE
    while subprocess.run(["umount", str(path)], capture_output=True).returncode:
        assert time.monotonic() < deadline, f"{path} cannot be unmounted"
        time.sleep(0.1)


def command(*words: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def impossible() -> str:
    """Why there can be no such disk here; empty where there can."""
    if os.geteuid() != 0:
        return "mounting a disk needs root"
    probe = subprocess.run(["sh", "-c", "command -v mkfs.ext4 && losetup -f"], capture_output=True)
    return "" if probe.returncode == 0 else "no mkfs.ext4 or no free loop device"


@contextmanager
def disk(folder: Path, megabytes: int = 256) -> Iterator[Disk]:
    """A disk that is gone afterwards."""
    found = Disk(folder, megabytes)
    try:
        yield found
    finally:
        found.unmount()
        found.image.unlink()


@contextmanager
def small(path: Path, megabytes: float) -> Iterator[None]:
    """A file system of so much room at `path`, a tmpfs."""
    path.mkdir(parents=True, exist_ok=True)
    command("mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(path))
    try:
        yield
    finally:
        unmount(path)


def stuff(path: Path) -> Path:
    """Fill a file system to the last byte, also what came free since the last call; returns the file that does it."""
    ballast = path / "ballast"
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return ballast


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A folder in which nobody may write, root included."""
    command("mount", "--bind", str(path), str(path))
    try:
        command("mount", "-o", "remount,ro,bind", str(path))
        yield
    finally:
        unmount(path)


@contextmanager
def slow(device: str, bytes_per_second: int) -> Iterator[Path]:
    """A device that takes so much from the processes whose ids are written to the file that this gives."""
    group = GROUPS / f"coatnet-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "blkio.throttle.write_bps_device").write_text(f"{device} {bytes_per_second}")
        yield group / "cgroup.procs"
    finally:
        deadline = time.monotonic() + PATIENCE
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()
