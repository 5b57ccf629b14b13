"""Files that look whole only when they are: written aside, flushed to disk, renamed, their folder flushed."""

import hashlib
import json
import os
import socket
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import webdataset

from configs.errors import InputError
from data_pipeline.manifest import LabelKind, Row
from data_pipeline.shard import MAX_SAMPLE_BYTES, pack_sidecar, sidecar_path

MAX_KEY = 90  # characters; the tar format stores 100 with the extension
TEMPORARY = ".partial"


@dataclass(frozen=True)
class Encoded:
    """One sample to be written: key, extension and bytes of the picture, its labels as indices."""

    key: str
    extension: str
    picture: bytes
    labels: tuple[int, ...]


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file under another name, flush it to disk, rename it, flush its folder."""
    temporary = aside(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_folder(path.parent)


def write_shard(root: Path, relative: str, samples: Iterable[Encoded], kind: LabelKind) -> Row:
    """Write the tar `root`/`relative` and its sidecar, both whole or not there; returns its row.

    Raises:
        InputError: a picture too large to be read again.
    """
    path = root / relative
    temporary = aside(path)
    try:
        offsets = _write_tar(temporary, samples, kind)
        digest, crcs = hashlib.sha256(), []
        with open(temporary, "rb") as file:
            for begin, end in pairwise(offsets):
                data = file.read(end - begin)
                digest.update(data)
                crcs.append(zlib.crc32(data))
            digest.update(file.read())  # the end-of-archive blocks
            size = file.tell()
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    write_whole(Path(sidecar_path(str(path))), pack_sidecar(offsets, crcs))
    return Row(relative, len(crcs), size, digest.hexdigest())


def aside(path: Path) -> Path:
    """The name under which this process writes `path`: two that write the same file do not disturb each other."""
    return path.with_name(f"{path.name}{TEMPORARY}-{socket.gethostname()}-{os.getpid()}")


def is_aside(path: Path) -> bool:
    """Whether the name is one of `aside`: what a killed process has left."""
    return TEMPORARY in path.name


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_tar(path: Path, samples: Iterable[Encoded], kind: LabelKind) -> list[int]:
    """Write one tar, flushed to disk; returns the n + 1 byte offsets of its samples."""
    offsets = []
    with open(path, "wb") as file:
        # Fixed owner and time: the same samples make the same bytes on any day and machine.
        with webdataset.TarWriter(file, user="", group="", encoder=False, mtime=0) as writer:
            for sample in samples:
                offsets.append(writer.tarstream.offset)
                if len(sample.picture) > MAX_SAMPLE_BYTES // 2:
                    limit = MAX_SAMPLE_BYTES // 2
                    raise InputError(f"key {sample.key!r}: {len(sample.picture)} bytes; the limit is {limit}")
                extension, label = "cls", b"%d" % sample.labels[0] if kind == "single" else b""
                if kind == "multi":
                    extension, label = "json", json.dumps({"labels": list(sample.labels)}).encode()
                writer.write({"__key__": sample.key, sample.extension: sample.picture, extension: label})
            offsets.append(writer.tarstream.offset)
        file.flush()
        os.fsync(file.fileno())
    return offsets
