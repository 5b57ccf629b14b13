"""What lies beside a .beton file, and what its head must say: known before FFCV reads anything of it.

FILE.beton         FFCV's: fields image (JPEG), label (of single labels), sample (JSON: key, labels, weights), crc32
FILE.beton.json    what it was made from and how, its size and sha256; written last, so it marks a whole file
"""

import hashlib
import json
import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import LabelKind
from data_pipeline.rows import LIMIT, SHA256

SUFFIX = ".beton"
FORMAT, VERSION = "coatnet-beton", 1
FIELDS = ("image", "label", "sample", "crc32")  # of the file; no label where a sample may have several
MAX_NOTES_BYTES = 1 << 26

_HEADER = struct.Struct("<HHIQQ")  # version, number of fields, bytes of a page, samples, begin of the table of places
_BETON_VERSION, _PLACE_BYTES = 2, 24
_PLACES = 2  # of each sample: its picture and its JSON


@dataclass(frozen=True)
class Notes:
    """The content of FILE.beton.json."""

    split: str
    samples: int
    shards: tuple[tuple[str, int], ...]  # of the split it was made from: path, samples
    label_kind: LabelKind
    vocabulary: tuple[str, ...]
    label_counts: tuple[int, ...] | None
    source: str  # fingerprint of that split
    card: Mapping[str, object]  # of that data set
    max_resolution: int  # pixels of a longer side at most; 0: as they were
    jpeg_quality: int
    ffcv: str
    bytes: int
    sha256: str

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @property
    def fingerprint(self) -> str:
        """What tells this data from any other; not the source's, because the pictures are other ones."""
        return hashlib.sha256(f"{FORMAT} {self.source} {self.split} {self.sha256}".encode()).hexdigest()


def is_beton(path: str) -> bool:
    """Whether `path` names a .beton file, or two."""
    return path.endswith(SUFFIX)


def read_notes(file: str) -> Notes:
    """What is written beside a .beton file, after a look at the file's size and header.

    Raises:
        DataError: one of the two is missing or damaged, or they do not belong together.
    """
    path = f"{file}.json"
    try:
        with open(path, "rb") as opened:
            data = opened.read(MAX_NOTES_BYTES + 1)
        content = json.loads(data) if len(data) <= MAX_NOTES_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; `coatnet data ffcv DIR --out {file}` writes both files (a URL has to be "
            f"fetched first)"
        ) from error
    if not isinstance(content, dict) or (content.pop("format", 0), content.pop("version", 0)) != (FORMAT, VERSION):
        raise DataError(f"{path}: not of this trainer (format {FORMAT!r}, version {VERSION}); write the file again")
    wrong = _wrong_notes(content)
    if wrong:
        raise DataError(f"{path}: {wrong}; restore it, or write the .beton again")
    content["shards"] = tuple((name, samples) for name, samples in content["shards"])
    content["vocabulary"] = tuple(content["vocabulary"])
    if content["label_counts"] is not None:
        content["label_counts"] = tuple(content["label_counts"])
    notes = Notes(**content)
    check_header(file, notes.samples, notes.bytes)
    return notes


def _wrong_notes(content: dict[str, Any]) -> str:
    """What is wrong with the content of a FILE.beton.json, empty if nothing is."""
    expected = {field.name for field in fields(Notes)}
    if set(content) != expected:
        return f"has {sorted(set(content) ^ expected)} too much or too little"
    names, shards, counts = content["vocabulary"], content["shards"], content["label_counts"]
    whole = [content[name] for name in ("samples", "bytes", "jpeg_quality", "max_resolution")]
    words = [content[name] for name in ("split", "source", "ffcv", "sha256")]
    if not all(type(number) is int and 0 <= number < LIMIT for number in whole):
        return "samples, bytes, jpeg_quality and max_resolution must be whole numbers"
    if not all(type(text) is str for text in words):
        return "split, source, ffcv and sha256 must be words"
    if not SHA256.fullmatch(content["sha256"]) or not isinstance(content["card"], dict):
        return "sha256 must be 64 hex digits, card a table"
    if content["label_kind"] not in ("single", "multi"):
        return f"label_kind = {content['label_kind']!r}: must be 'single' or 'multi'"
    if not isinstance(names, list) or not names or not all(type(name) is str for name in names):
        return "vocabulary must be a list of names"
    if len(set(names)) != len(names):
        return "vocabulary names a class twice"
    if counts is not None and not (
        isinstance(counts, list) and len(counts) == len(names) and all(type(n) is int and n >= 0 for n in counts)
    ):
        return "label_counts must be null or a number for each class"
    if not isinstance(shards, list) or not all(isinstance(shard, list) and len(shard) == 2 for shard in shards):
        return "shards must be a list of [path, samples]"
    if not all(type(name) is str and type(n) is int and 0 < n < LIMIT for name, n in shards):
        return "shards must be a list of [path, samples]"
    if not shards or sum(n for _, n in shards) != content["samples"]:
        return f"its shards do not hold {content['samples']} samples"
    return ""


def check_header(file: str, samples: int, size: int) -> None:
    """Compare a .beton's size and header with what it should be, before FFCV reads tables of the lengths it says.

    Raises:
        DataError: they differ, or there is no such file.
    """
    try:
        with open(file, "rb") as opened:
            found = os.fstat(opened.fileno())
            head = opened.read(_HEADER.size)
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: missing or unreadable ({error}); fetch it again or write it again") from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != size or len(head) < _HEADER.size:
        raise StoreError(f"{file}: {found.st_size} bytes, {file}.json says {size}; fetch both again")
    version, columns, page, count, places = _HEADER.unpack(head)
    if version != _BETON_VERSION or columns not in (len(FIELDS), len(FIELDS) - 1) or count != samples:
        raise DataError(
            f"{file}: version {version} with {columns} fields and {count} samples; must be version {_BETON_VERSION} of "
            f"`coatnet data ffcv` with {samples} samples; fetch it again or write it again"
        )
    if not page or page & (page - 1) or places + _PLACE_BYTES * _PLACES * samples != size:
        raise DataError(f"{file}: its header does not fit {size} bytes; fetch it again or write it again")


def checksum(index: int, picture: bytes, notes: bytes) -> int:
    """The crc32 of a sample: of its number, its JSON as stored, and its JPEG."""
    return zlib.crc32(picture, zlib.crc32(notes, zlib.crc32(struct.pack("<Q", index))))
