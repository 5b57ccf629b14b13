"""Where pictures come from: folders, lists, Parquet files that hold them, tars. Listed first, in parts for processes.

A source is listed without reading pictures: each entry is told from all others by its name, and the digest over names,
labels, sizes and times says whether a later call means the same input. `examine` reads the parts.
"""

import csv
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError, unknown
from data_pipeline.building.labels import words_of

KINDS = ("folder", "list", "huggingface", "tars")
LISTS = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE_COLUMNS = ("image", "path", "file", "filename", "file_name", "url")
LABEL_COLUMNS = ("label", "labels", "class", "classes", "category")
PART = 1000  # entries that one process examines at a time

Packed = Literal["huggingface", "tar"]


@dataclass(frozen=True)
class Entry:
    """One picture in a file or at a URL of its own: its name in the source, the place, its labels as words."""

    name: str
    place: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Loose:
    """A part of a source: some entries."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Pack:
    """A part of a source: a file that holds pictures and labels.

    `image` and `label` are columns of Parquet; of a tar, `label` is the member, such as `cls` or `json.labels`.
    """

    form: Packed
    name: str  # of the file, inside the source
    path: str
    image: str
    label: str


Part = Loose | Pack


@dataclass(frozen=True)
class Source:
    """A source, listed."""

    kind: str
    name: str  # for the data card: the last part of the path, which says nothing of the machine
    parts: tuple[Part, ...]
    digest: str


@dataclass(frozen=True)
class Reading:
    """How the user says a source is to be read.

    Args:
        kind: one of KINDS, or `auto`.
        labels: of a folder: `folder`, its first-level subfolder, or `path`, its folder and all above it.
        columns: of tables: `image` and `label` to the columns' names.
        label_field: of tars: the member that holds the label; empty: `cls` or `json.labels`.
    """

    kind: str = "auto"
    labels: str = "folder"
    columns: Mapping[str, str] | None = None
    label_field: str = ""


def list_source(given: str, reading: Reading) -> Source:
    """List what is at `given`: a folder, a file, or a pattern such as `data/train-*.parquet`.

    Raises:
        InputError: nothing is there, or not of the kind asked for; a label or a row that cannot be understood.
    """
    files = _files(given)
    kind = _kind(given, files) if reading.kind == "auto" else reading.kind
    if kind not in KINDS:
        raise unknown("kind of source", kind, KINDS)
    _check_options(kind, reading)
    digest = hashlib.sha256(kind.encode())
    files = [file.absolute() for file in files]  # tasks may run elsewhere
    home = Path(os.path.commonpath([file.parent for file in files])) if files else Path(given)
    parts: list[Part]
    if kind == "folder":
        parts = list(_loose(_folder_entries(Path(given), reading.labels), digest))
    elif kind == "list":
        parts = list(_loose((entry for file in files for entry in _list_entries(file, home, reading)), digest))
    else:
        parts = []
        for file in files:
            name = file.relative_to(home).as_posix()
            digest.update(f"{name}\0{_stamp(file)}\n".encode(errors="surrogateescape"))
            columns = _packed_columns(file, reading) if kind == "huggingface" else ("", reading.label_field)
            parts.append(Pack("huggingface" if kind == "huggingface" else "tar", name, str(file), *columns))
    if not parts:
        raise InputError(f"{given}: no pictures found as {kind}; see `coatnet data --help` for what a source may be")
    return Source(kind, Path(given).resolve().name, tuple(parts), digest.hexdigest())


def _files(given: str) -> list[Path]:
    """The files a source names; for a folder its own files, those of `data/` included."""
    path = Path(given)
    if path.is_dir():
        found = [*path.iterdir(), *((path / "data").iterdir() if (path / "data").is_dir() else ())]
        return sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    if path.is_file():
        return [path]
    matching = sorted(Path(name) for name in glob.glob(given) if Path(name).is_file())
    if not given or not matching:
        raise InputError(f"source {given!r}: no such folder or file, and no file matches it")
    return matching


def _kind(given: str, files: list[Path]) -> str:
    """What a source looks like."""
    suffixes = {file.suffix.lower() for file in files}
    if Path(given).is_dir():
        files = [file for file in files if file.suffix.lower() in (".parquet", ".tar")]
        if not files:
            return "folder"
        suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".tar"}:
        return "tars"
    if suffixes == {".parquet"}:
        return "huggingface" if _image_structs(files[0]) else "list"
    if len(suffixes) == 1 and suffixes < set(LISTS):
        return "list"
    raise InputError(
        f"{given}: files of {', '.join(sorted(suffixes))}: say what they are with --kind {'|'.join(KINDS)}"
    )


def _check_options(kind: str, reading: Reading) -> None:
    """Refuse options that another kind of source has."""
    if reading.labels not in ("folder", "path"):
        raise unknown("--labels", reading.labels, ("folder", "path"))
    for option, given, owners in (
        ("--labels path", reading.labels != "folder", ("folder",)),
        ("--columns", bool(reading.columns), ("list", "huggingface")),
        ("--label-field", bool(reading.label_field), ("tars",)),
    ):
        if given and kind not in owners:
            raise InputError(
                f"{option} belongs to a source of kind {' or '.join(owners)}, this is {kind}; leave it out"
            )


def _stamp(path: Path) -> str:
    """Size and time of a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return f"{status.st_size} {status.st_mtime_ns}"


def _loose(entries: Iterable[Entry], digest: "hashlib._Hash") -> Iterator[Loose]:
    """Entries in parts; names, labels, sizes and times go into the digest."""
    chosen: list[Entry] = []
    for entry in entries:
        stamp = "" if is_web(entry.place) else _stamp(Path(entry.place)) if os.path.exists(entry.place) else "missing"
        line = json.dumps([entry.name, entry.labels, stamp])
        digest.update(line.encode() + b"\n")
        chosen.append(entry)
        if len(chosen) == PART:
            yield Loose(tuple(chosen))
            chosen = []
    if chosen:
        yield Loose(tuple(chosen))


def is_web(place: str) -> bool:
    """Whether a place is fetched rather than opened."""
    return urlsplit(place).scheme in ("http", "https")


def _folder_entries(root: Path, labels: str) -> Iterator[Entry]:
    """Every file below `root` by name, hidden ones left out; links are followed."""
    for path in _walk(root, ()):
        relative = path.relative_to(root)
        above = relative.parts[:-1]
        if labels == "folder" and not above:
            raise InputError(
                f"{path}: lies in no class folder; put it into one (such as {root}/cat/1.jpg) or say --labels path"
            )
        words = above[:1] if labels == "folder" else tuple("/".join(above[: n + 1]) for n in range(len(above)))
        yield Entry(relative.as_posix(), str(path.absolute()), tuple(words))


def _walk(folder: Path, trail: tuple[str, ...]) -> Iterator[Path]:
    """All files below a folder by name. A linked folder that leads back to one above it is left out."""
    here = os.path.realpath(folder)
    if here in trail:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, (*trail, here))
        else:
            yield path


def _list_entries(file: Path, home: Path, reading: Reading) -> Iterator[Entry]:
    """The rows of a CSV, TSV, JSONL or Parquet file."""
    image = label = ""
    for number, row in _rows(file):
        where = f"{file}: row {number}"
        if not image:
            image, label = _columns(file, list(row), reading)
        place = row.get(image)
        if not isinstance(place, str) or not place or "\0" in place:
            raise InputError(f"{where}: {image} = {place!r}: must be a path or a URL")
        scheme = urlsplit(place).scheme
        if scheme and not is_web(place):
            raise InputError(f"{where}: {image} = {place!r}: a picture is a file or at http:// or https://")
        words = words_of(row.get(label), where)
        if is_web(place) or os.path.isabs(place):
            yield Entry(place, place, words)
        else:
            yield Entry((file.parent.relative_to(home) / place).as_posix(), str(file.parent / place), words)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(number, row) of a table; the first row is 1."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            number = 0
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
            return
        with file.open(encoding="utf-8-sig", newline="") as text:
            if suffix == ".jsonl":
                for number, line in enumerate(text, 1):
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{file}: row {number}: must be a JSON object")
                    yield number, row
            elif suffix in (".csv", ".tsv"):
                table = csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
                for number, cells in enumerate(table, 1):
                    if None in cells or None in cells.values():
                        raise InputError(f"{file}: row {number}: has not as many cells as the header")
                    yield number, dict(cells)
            else:
                raise InputError(f"{file}: a list must be one of {', '.join(LISTS)}")
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: cannot be read as {suffix[1:]}: {error}") from error


def _columns(file: Path, names: list[str], reading: Reading) -> tuple[str, str]:
    """The columns of pictures and labels: the user's, else the first of the usual names."""
    found = []
    for role, usual in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
        wanted = (reading.columns or {}).get(role, "")
        if wanted and wanted not in names:
            raise unknown(f"column of {file}", wanted, names)
        name = wanted or next((name for name in usual if name in names), "")
        if not name:
            known = ", ".join(names)
            raise InputError(f"{file}: no column of {role}s found; say --columns {role}=NAME; it has {known}")
        found.append(name)
    return found[0], found[1]


def _image_structs(file: Path) -> list[str]:
    """The columns of a Parquet file that hold encoded pictures: binary, or a struct with a binary field `bytes`."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: not readable as Parquet: {error}") from error
    found = []
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            found.append(field.name)
    return found


def _packed_columns(file: Path, reading: Reading) -> tuple[str, str]:
    """The columns of a Parquet file with pictures in it."""
    structs = _image_structs(file)
    columns = dict(reading.columns or {})
    if not structs:
        raise InputError(f"{file}: no column holds encoded pictures (binary, or a struct of bytes and path)")
    columns.setdefault("image", structs[0])
    image, label = _columns(file, list(pq.read_schema(file).names), Reading(columns=columns))
    if image not in structs:
        raise InputError(f"{file}: column {image!r} holds no encoded pictures; those are {', '.join(structs)}")
    return image, label
