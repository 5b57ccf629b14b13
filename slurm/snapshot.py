"""A copy of the code in the run's folder, so that a queued or requeued job never sees later edits."""

import hashlib
import shutil
import subprocess
from pathlib import Path

from slurm.job import write_whole

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "models", "data_pipeline", "trainer", "slurm")


def digest() -> str:
    """Hash of the rooms as they are on disk now: the name of their copy."""
    found = hashlib.sha256()
    for path in _files():
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:12]


def take(folder: Path) -> Path:
    """Copy the rooms as they are on disk now, uncommitted changes included, to a folder of their hash in `folder`.

    With git the tracked files and the new ones that it does not ignore are taken; without, every file of the rooms.

    Returns:
        Where the copy is; SNAPSHOT in it names the commit, with `+` where files differ from it. Equal code is copied
        once.
    """
    target = folder / digest()
    if target.exists():
        return target
    aside = folder / "partial"
    shutil.rmtree(aside, ignore_errors=True)
    for path in _files():
        copy = aside / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    changed = "+" if _git("status", "--porcelain", "--", *ROOMS) else ""
    write_whole(aside / "SNAPSHOT", f"{_git('rev-parse', '--short=12', 'HEAD') or 'unknown'}{changed}\n")
    aside.rename(target)
    return target


def _files() -> list[Path]:
    """The files to copy."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", *ROOMS)
    if listed:
        return sorted(ROOT / line for line in listed.splitlines() if (ROOT / line).is_file())
    found = (path for room in ROOMS for path in (ROOT / room).rglob("*"))
    return sorted(path for path in found if path.is_file() and path.suffix != ".pyc")


def _git(*words: str) -> str:
    """What git says of the code's own repository; nothing where there is none."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
