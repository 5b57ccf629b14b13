"""Files that last: written with usual permissions, forced to disk, measured, and verified against what was measured."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1  # of a checkpoint's manifest


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file of tensors with an ordinary file's permissions; safetensors lets nobody but the owner read."""
    path.touch()
    usual = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(usual)


def sync_and_measure(path: Path) -> list[Any]:
    """Force a file to disk; returns [bytes, sha256]."""
    sync(path)
    return [path.stat().st_size, sha256(path)]


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """A file's sha256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_files(path: Path) -> dict[str, tuple[int, str]] | str:
    """The files that the manifest lists, or what is wrong with it."""
    try:
        text = (path / "manifest.json").read_bytes()
        if (path / "COMPLETE").read_text() != hashlib.sha256(text).hexdigest():
            return "manifest.json is not the one that COMPLETE names"
        content = json.loads(text)
        if content["format"] != FORMAT:
            return f"format {content['format']}, this program reads {FORMAT}"
        files = {Path(name).name: (int(size), str(sha)) for name, (size, sha) in content["files"].items()}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing: the save was interrupted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    return files


def verify(path: Path, size: int, wanted: str) -> str:
    """What is wrong with one file, or nothing."""
    try:
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, {size} were written"
        return "" if sha256(path) == wanted else f"{path.name} does not have the bytes that were written (sha256)"
    except OSError as error:
        return f"{path.name}: {error}"
