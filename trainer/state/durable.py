"""Files that last: written in one pass that also measures them, forced to disk, verified against what was measured."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import InputError

FORMAT = 1  # of a checkpoint's manifest
CHUNK = 8 << 20  # bytes written and hashed at a time; both let other threads run meanwhile
FLUSH = 256 << 20  # bytes that wait for the disk at most: where more do, Linux makes every writer wait, the log's too
TYPES = {  # in the words of safetensors; a checkpoint holds the first and the second
    torch.float32: "F32", torch.int64: "I64", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class FormatError(InputError):
    """Whole, but in a format that this program does not read."""


def write_tensors(path: Path, tensors: Mapping[str, Sequence[Tensor]]) -> list[Any]:
    """Write a safetensors file of tensors, each given by the parts that are laid end to end; returns [bytes, sha256].

    The library's own writer wants every tensor whole and its file is read again for the checksum; a state of many
    fragments would be copied first. Here each byte is touched once, on its way out: the checksum is of what was in
    memory, so that a disk that stores something else is found too. A part on a device comes over as it is written.

    Args:
        tensors: a single part keeps its shape, several make a 1-D tensor; none is an empty one of float32.
    """
    entries = {}
    for name, parts in tensors.items():
        shape = tuple(parts[0].shape) if len(parts) == 1 else (sum(part.numel() for part in parts),)
        entries[name] = (parts[0].dtype if parts else torch.float32, shape)
    return write_stream(path, entries, (part for parts in tensors.values() for part in parts), {})


def write_stream(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> list[Any]:
    """Write a safetensors file of which no more is in memory than one part; returns [bytes, sha256].

    Args:
        entries: (type, shape) of the tensors by name.
        parts: whole or in pieces, in the order of `entries`.
        metadata: for the header; equal contents give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (kind, shape) in entries.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": TYPES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _written(path, _bytes(len(text).to_bytes(8, "little") + text, parts))


def write_text(path: Path, text: str) -> list[Any]:
    """Write a small file; returns [bytes, sha256]."""
    return _written(path, iter([memoryview(text.encode())]))


def _bytes(header: bytes, parts: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file in chunks."""
    yield memoryview(header)
    for part in parts:
        if part.numel():
            flat = part.detach().cpu().contiguous().view(-1).view(torch.uint8)
            whole = memoryview(flat.numpy().data)
            yield from (whole[first : first + CHUNK] for first in range(0, len(whole), CHUNK))


def _written(path: Path, chunks: Iterator[memoryview]) -> list[Any]:
    """Write a file, force it to disk; returns [bytes, sha256]."""
    total, waiting, digest = 0, 0, hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            rest = chunk
            while len(rest):  # a write may take a part only, for example the last that fits on the disk
                rest = rest[file.write(rest) :]
            digest.update(chunk)
            total, waiting = total + len(chunk), waiting + len(chunk)
            if waiting >= FLUSH:
                os.fdatasync(file.fileno())
                waiting = 0
        os.fsync(file.fileno())
    return [total, digest.hexdigest()]


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, so that a power cut takes none of them away again."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path, afresh: bool = False) -> str:
    """A file's sha256, in hex; with `afresh` of what the disk has, not of what memory still holds of it."""
    with path.open("rb", buffering=0) as file:
        if afresh:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(path: Path, rank: int = 0, world: int = 1, afresh: bool = False) -> str:
    """What is wrong with a checkpoint's files, or nothing; of `world` callers each reads its share.

    Args:
        afresh: see `sha256`.

    Raises:
        FormatError: it is another release's.
    """
    files = manifest_files(path)
    if isinstance(files, str):
        return files
    mine = sorted(files)[rank::world]
    return next((bad for name in mine if (bad := verify(path / name, *files[name], afresh))), "")


def manifest_files(path: Path) -> dict[str, tuple[int, str]] | str:
    """The files that the manifest lists, or what is wrong with it.

    Raises:
        FormatError: it is another release's.
    """
    try:
        text = (path / "manifest.json").read_bytes()
        if (path / "COMPLETE").read_text() != hashlib.sha256(text).hexdigest():
            return "manifest.json is not the one that COMPLETE names"
        content = json.loads(text)
        own = content["format"] == FORMAT
        listed = content["files"].items() if own else ()
        files = {Path(name).name: (int(size), str(sha)) for name, (size, sha) in listed}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing: the save was interrupted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    if not own:
        found = content["format"]
        raise FormatError(f"{path}: has format {found!r}, this program reads {FORMAT}; take the release that wrote it")
    return files


def verify(path: Path, size: int, wanted: str, afresh: bool = False) -> str:
    """What is wrong with one file, or nothing."""
    try:
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, {size} were written"
        if sha256(path, afresh) != wanted:
            return f"{path.name} does not have the bytes that were written (sha256)"
    except OSError as error:
        return f"{path.name}: {error}"
    return ""
