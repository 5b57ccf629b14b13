"""One part of a source examined by one process: every picture's bytes hashed, its header read, its labels found.

What comes out is a table, one row per picture, which says where its bytes lie; a picture that cannot be used has a
`problem` in place of a size. Pictures in Parquet are copied out of it, because single rows of it cannot be read.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from configs.errors import InputError
from configs.schema import Data
from data_pipeline.building.labels import words_of
from data_pipeline.building.sources import Loose, Pack, Part, Source, is_web
from data_pipeline.building.tars import label_members, tar_labels, tar_samples
from data_pipeline.building.writing import aside
from data_pipeline.decode import FORMATS, MAX_PICTURE_BYTES
from data_pipeline.errors import Damage
from data_pipeline.shard import MAX_SAMPLE_BYTES

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # by Pillow's name of the format
UNKNOWN = -1  # bytes of a picture that is fetched only when its shard is written
EXAMINED = pa.schema(
    [
        ("key", pa.large_string()),
        ("place", pa.large_string()),  # file or URL
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("extension", pa.string()),
        ("content", pa.binary(32)),  # sha256 of the picture's bytes, or of its URL
        ("turn", pa.uint64()),  # the picture's place in the shuffled order
        ("labels", pa.large_list(pa.large_string())),
        ("heldout", pa.bool_()),
        ("problem", pa.large_string()),  # empty: none
    ]
)


@dataclass(frozen=True)
class Job:
    """A part to examine: `staged` is the file that pictures out of Parquet are copied to."""

    part: Part
    heldout: bool
    staged: str


@dataclass(frozen=True)
class _Found:
    """A picture of a part, before it is looked at."""

    name: str
    place: str
    offset: int
    labels: tuple[str, ...]
    data: bytes | None  # None: not read, because it is fetched later or cannot be read
    problem: str = ""


def examine(job: Job) -> pa.Table:
    """The table of a part (EXAMINED).

    Raises:
        InputError: a file of pictures cannot be read at all, or a label not be understood.
    """
    part = job.part
    if isinstance(part, Loose):
        found = _loose(part)
    elif part.form == "tar":
        found = _tar(part)
    else:
        found = _parquet(part, Path(job.staged))
    rows = [_row(one, job.heldout) for one in found]
    return pa.Table.from_pylist(rows, schema=EXAMINED)


def picture_format(data: bytes) -> str:
    """The extension of an encoded picture, by its content; the name it has may be wrong.

    Raises:
        Damage: no JPEG, PNG or WebP, or too many bytes or pixels to be trained on.
    """
    if len(data) > min(MAX_PICTURE_BYTES, MAX_SAMPLE_BYTES // 2):
        raise Damage(f"{len(data)} bytes: too large")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            (width, height), name = picture.size, picture.format
    except Exception as error:  # parsers of untrusted bytes raise anything: struct.error, KeyError, SyntaxError ...
        raise Damage(f"no readable JPEG, PNG or WebP: {type(error).__name__}") from error
    if not 0 < width * height <= Data().max_pixels:
        raise Damage(f"{width} x {height} pixels: the limit is {Data().max_pixels}")
    return EXTENSIONS[str(name)]


def _row(found: _Found, heldout: bool) -> dict[str, object]:
    """The table's row of a picture."""
    extension, problem = "", found.problem
    size = UNKNOWN
    if found.data is not None:
        size = len(found.data)
        try:
            extension = picture_format(found.data)
        except Damage as error:
            problem = str(error)
    content = found.data if found.data is not None else os.fsencode(found.name)
    key = _key(f"heldout/{found.name}" if heldout else found.name)  # two sources may use the same names
    return {
        "key": key,
        "place": found.place,
        "offset": found.offset,
        "bytes": size,
        "extension": extension,
        "content": hashlib.sha256(content).digest(),
        "turn": int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"),
        "labels": list(found.labels),
        "heldout": heldout,
        "problem": f"{found.name}: {problem}" if problem else "",
    }


def _key(name: str) -> str:
    """A readable, unique key: the last parts of the name, and a hash of the whole, because they are shortened."""
    parts = [part for part in name.split("/") if part][-2:]
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", parts[-1]) if parts else ""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "-", part)[:30] for part in (*parts[:-1], stem)]
    return "/".join([*plain[:-1], f"{plain[-1]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:20]}"])


def _loose(part: Loose) -> Iterator[_Found]:
    """Pictures in files of their own; URLs are not fetched yet."""
    for entry in part.entries:
        if is_web(entry.place):
            yield _Found(entry.name, entry.place, 0, entry.labels, None)
            continue
        try:
            if os.path.getsize(entry.place) > MAX_PICTURE_BYTES:
                raise OSError(f"larger than {MAX_PICTURE_BYTES} bytes")
            data = Path(entry.place).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            yield _Found(entry.name, entry.place, 0, entry.labels, None, f"cannot be read: {reason}")
            continue
        yield _Found(entry.name, entry.place, 0, entry.labels, data)


def _tar(part: Pack) -> Iterator[_Found]:
    """Pictures in a tar, left where they are."""
    with open(part.path, "rb") as file:
        for sample in tar_samples(part.path):
            name, extension = f"{part.name}/{sample.key}", sample.picture
            if sample.problem or not extension:
                problem = sample.problem or f"needs one picture, has {sorted(sample.members)}"
                yield _Found(name, part.path, sample.begin, (), None, problem)
                continue
            wanted = {extension, *label_members(sample, part.label)}
            data = {}
            for member in wanted:
                offset, size = sample.members[member]
                data[member] = os.pread(file.fileno(), min(size, MAX_SAMPLE_BYTES), offset)
            labels = tar_labels(sample, data, part.label, f"{part.path}: {sample.key}")
            yield _Found(name, part.path, sample.members[extension][0], labels, data[extension])


def _parquet(part: Pack, staged: Path) -> Iterator[_Found]:
    """Pictures in a Parquet file, copied to `staged`."""
    temporary, number = aside(staged), 0
    try:
        file = pq.ParquetFile(part.path, pre_buffer=False)
        names = _class_names(file.schema_arrow, part.label)
        with open(temporary, "wb") as out:
            columns = [part.image, part.label]
            for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    cell, where = row[part.image], f"{part.path}: row {number}"
                    data = cell.get("bytes") if isinstance(cell, dict) else cell
                    stem = cell.get("path") if isinstance(cell, dict) else None
                    name = f"{part.name}/{number:08d}-{Path(str(stem or 'picture')).name}"
                    words = _named(words_of(row[part.label], where), names, where)
                    problem = "" if data is not None else "holds no bytes, only a path"
                    yield _Found(name, str(staged), out.tell(), words, data, problem)
                    out.write(data or b"")
                    number += 1
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, staged)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{part.path}: cannot be read as Parquet: {error}") from error


def class_names(source: Source) -> list[str]:
    """The classes in the order that the metadata of a source's Parquet files gives; none where there are none.

    Raises:
        InputError: the files name different classes.
    """
    packs = [part for part in source.parts if isinstance(part, Pack) and part.form == "huggingface"]
    found = [_class_names(pq.read_schema(part.path), part.label) for part in packs]
    for names, part in zip(found, packs, strict=True):
        if names != found[0]:
            raise InputError(f"{part.path}: names other classes than {packs[0].path}; build them one by one")
    return found[0] if found else []


def _class_names(schema: pa.Schema, label: str) -> list[str]:
    """The names of the classes that the Hugging Face metadata of a Parquet file gives; none where there are none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        while isinstance(feature, list) or "names" not in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        names = feature["names"]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return []  # metadata of another form name nothing: the labels stay as they are
    return names if isinstance(names, list) and all(type(name) is str for name in names) else []


def _named(words: tuple[str, ...], names: list[str], where: str) -> tuple[str, ...]:
    """Indices into the metadata's names as these names."""
    if not names:
        return words
    for word in words:
        if not word.isdecimal() or int(word) >= len(names):
            raise InputError(f"{where}: label {word}: the file's metadata name {len(names)} classes, from 0 on")
    return tuple(names[int(word)] for word in words)
