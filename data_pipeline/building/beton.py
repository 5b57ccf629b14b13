"""`coatnet data ffcv`: a split of a data set as FFCV's .beton file (`data_pipeline.ffcv`); and its check.

Pictures are decoded and encoded in as many processes as asked for, by FFCV's own field, and put into the file by this
one, in the split's order: the same split makes the same bytes with any number of processes. FFCV's writer in its own
processes waits for ever once one of them has failed, and would need as much of /dev/shm as the file has tables.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Data
from data_pipeline import ffcv
from data_pipeline.beton import SUFFIX, Notes, checksum, read_notes
from data_pipeline.building.findings import WHOLE_SHARD, Finding, Report, decode_whole
from data_pipeline.building.workers import spread
from data_pipeline.building.writing import aside, flush_folder, write_whole
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, LabelKind, Split, open_dataset
from data_pipeline.members import Labelling
from data_pipeline.shard import OpenShards
from data_pipeline.store import is_url

CHUNK = 32  # samples that a process is given at a time

Malloc = Callable[[int], tuple[int, NDArray[np.uint8]]]


@dataclass(frozen=True)
class Form:
    """How pictures are stored: `max_resolution` pixels of the longer side at most (0: as they are), JPEG quality."""

    max_resolution: int = 0
    jpeg_quality: int = 90


@dataclass(frozen=True)
class _Job:
    """Samples [first, last) of the shard at `path`, which holds `samples`, to be encoded."""

    path: str
    samples: int
    first: int
    last: int
    classes: int
    kind: LabelKind
    labelling: Labelling
    form: Form


class _Stored(NamedTuple):
    """What a field of FFCV makes of a value: its row of the table, but for the place, and the bytes kept there."""

    row: bytes
    data: bytes


class _Encoded(NamedTuple):
    """A sample as it goes into the file."""

    picture: _Stored
    label: int
    notes: _Stored


class _Placed:
    """A field of FFCV whose values are `_Stored` ones; `pointer` is what its rows call their place."""

    def __init__(self, pointer: str) -> None:
        self._pointer = pointer

    def encode(self, row: NDArray[Any], value: _Stored, malloc: Malloc) -> None:
        """Put the value into the file and its place into the table; called by FFCV."""
        place, space = malloc(len(value.data))
        space[:] = np.frombuffer(value.data, dtype=np.uint8)
        row[:] = np.frombuffer(value.row, dtype=row.dtype)
        row[self._pointer] = place


@dataclass(frozen=True)
class _Part:
    """Samples [first, last) of a .beton file, to be read again."""

    split: Split
    first: int
    last: int
    classes: int
    kind: LabelKind
    deep: bool


class _Read(NamedTuple):
    """What reading a part gave."""

    findings: tuple[Finding, ...]
    decoded: int


def write_beton(source: str, out: str, split: str = "train", form: Form | None = None, workers: int = 1) -> str:
    """Write `split` of the data set in folder `source` to `out` and, last, what it is to `out`.json.

    Returns:
        What to tell the user. A file that is already there and is the same is left alone.

    Raises:
        InputError: `out` cannot be written or is something else, FFCV is missing, or a setting is out of range.
        DataError: the data set cannot be opened, or a sample is damaged.
    """
    form = form or Form()
    path = Path(out)
    if path.suffix != SUFFIX or not path.absolute().parent.is_dir():
        raise InputError(f"--out {out}: must be FILE{SUFFIX} in a folder that exists")
    if not 1 <= form.jpeg_quality <= 100:
        raise InputError(f"--jpeg-quality {form.jpeg_quality}: must be from 1 to 100; 90 is usual")
    if is_url(source):
        raise InputError(f"{source}: a .beton is made of a local folder; fetch the data set first")
    ffcv.package()
    dataset = open_dataset(source)
    part = dataset.split(split)
    if os.path.lexists(f"{out}.json") or os.path.lexists(out):
        return _there(out, part, form)
    temporary = aside(path)
    try:
        _clear(path, temporary)
        _write(temporary, dataset, part, form, workers)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        notes = Notes(
            split=split, samples=part.samples, shards=tuple((row.path, row.samples) for row in part.rows),
            label_kind=dataset.label_kind, vocabulary=dataset.vocabulary, label_counts=dataset.label_counts,
            source=part.fingerprint, card=dataset.card, **asdict(form), ffcv=ffcv.FFCV, bytes=size, sha256=digest,
        )  # fmt: skip
        written = ffcv.split_of(str(temporary), notes)
        read = _read_part(_Part(written, 0, part.samples, dataset.classes, dataset.label_kind, False))
        if read.findings:
            raise DataError(f"FFCV has not written what it was given: {read.findings[0].reason}")
        os.replace(temporary, path)
        flush_folder(path.absolute().parent)
        write_whole(Path(f"{out}.json"), notes.to_json().encode())
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}; choose another place") from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return f"{out}: {part.samples} samples of {source}, split {split!r}, {size / 1e6:.1f} MB"


def _clear(path: Path, temporary: Path) -> None:
    """Delete what killed writers of `path` on this machine have left: as large as the file itself."""
    ours = temporary.name.removesuffix(str(os.getpid()))
    for left in path.absolute().parent.iterdir():
        number = left.name.removeprefix(ours)
        if left.name.startswith(ours) and number.isdecimal():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                left.unlink(missing_ok=True)
            except PermissionError:
                continue  # alive, and somebody else's


def _there(out: str, part: Split, form: Form) -> str:
    """What to say of a file that is already there.

    Raises:
        InputError: it is not what would be written.
    """
    if not os.path.lexists(f"{out}.json"):
        raise InputError(f"{out}: is there already, without its {out}.json; delete it or choose another name")
    notes = read_notes(out)
    wanted = (part.fingerprint, part.name, form.max_resolution, form.jpeg_quality)
    if (notes.source, notes.split, notes.max_resolution, notes.jpeg_quality) != wanted:
        raise InputError(f"{out}: is there already, made otherwise; delete it and its .json, or choose another name")
    return f"{out}: is there already, with these {notes.samples} samples; nothing to do"


def _write(path: Path, dataset: Dataset, part: Split, form: Form, workers: int) -> None:
    """The .beton file at `path`, by the parts of FFCV's writer.

    Raises:
        DataError: a sample is damaged, or does not fit.
        OSError: the file cannot be written.
    """
    _, writers, fields, allocator = ffcv.package()
    single = dataset.label_kind == "single"
    columns = {"image": fields.RGBImageField()} | ({"label": fields.IntField()} if single else {})
    columns |= {"sample": fields.JSONField(), "crc32": fields.IntField()}
    placed = columns | {"image": _Placed("data_ptr"), "sample": _Placed("ptr")}
    writer = writers.DatasetWriter(str(path), columns, num_workers=1)
    writer.num_samples = part.samples
    writer.prepare()
    # Its table would lie in /dev/shm, where going beyond the limit kills a process; a single one need not share it.
    shared = writer.metadata_sm
    writer.metadata_sm = SimpleNamespace(buf=bytearray(shared.size))
    shared.close()
    shared.unlink()
    table = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type, count=part.samples)
    space = allocator.MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
    with space:
        for index, (picture, label, notes) in enumerate(_encoded(dataset, part, form, workers)):
            size = len(picture.data) + len(notes.data)
            if size > writer.page_size:
                raise DataError(
                    f"{part.name}: sample {index}: {size} bytes as JPEG, FFCV takes {writer.page_size}; give "
                    f"--max-resolution"
                )
            values = [picture, *([label] if single else []), notes, checksum(index, picture.data, notes.data)]
            writers.handle_sample(values, index, writer.metadata_type.names, table, space, placed)
    writer.finalize(space.allocations)


def _encoded(dataset: Dataset, part: Split, form: Form, workers: int) -> Iterator[_Encoded]:
    """All samples of a split, in its order."""
    labels = dataset.classes, dataset.label_kind, part.labelling
    jobs = (
        _Job(path, samples, first, min(first + CHUNK, samples), *labels, form)
        for path, samples in zip(part.shard_paths, part.counts.tolist(), strict=True)
        for first in range(0, samples, CHUNK)
    )
    for chunk in spread(_encode, jobs, workers):
        yield from chunk


def _encode(job: _Job) -> list[_Encoded]:
    """The samples of a job.

    Raises:
        DataError: one is damaged, or cannot be stored as JPEG.
    """
    from data_pipeline.decode import decode  # here, because it imports torch

    fields, form = ffcv.package().fields, job.form
    image = fields.RGBImageField("jpg", form.max_resolution or None, jpeg_quality=form.jpeg_quality)
    count = np.array([job.samples], dtype=np.int64)
    shards, found = OpenShards([job.path], count, limit=1, labelling=lambda shard: job.labelling), []
    for number in range(job.first, job.last):
        sample = shards.read(0, number, job.classes)
        where = f"{shards.where(0, number)}, key {sample.key!r}"
        try:
            if job.kind == "single" and len(sample.labels) != 1:
                raise DataError(f"{len(sample.labels)} labels in a data set of single labels")
            pixels_HWC = decode(sample.picture, Data().max_pixels).permute(1, 2, 0).contiguous().numpy()
            picture = _stored(image, pixels_HWC)
        except Exception as error:  # OpenCV has its own errors for shapes that it does not take
            raise DataError(f"{where}: cannot be stored: {error}") from error
        notes = {"key": sample.key, "labels": sample.labels, "weights": sample.weights}
        found.append(_Encoded(picture, (*sample.labels, 0)[0], _stored(fields.JSONField(), notes)))
    shards.close()
    return found


def _stored(field: Any, value: object) -> _Stored:
    """What an FFCV field makes of a value."""
    kept: list[NDArray[np.uint8]] = []

    def keep(size: int) -> tuple[int, NDArray[np.uint8]]:
        kept.append(np.zeros(size, dtype=np.uint8))
        return 0, kept[-1]

    row = np.zeros(1, dtype=field.metadata_type)
    field.encode(row, value, keep)
    return _Stored(row.tobytes(), kept[0].tobytes())


def verify_beton(path: str, deep: bool = False, workers: int = 1) -> Report:
    """Read every byte of a .beton file again: its checksum, those of its samples and, with `deep`, every picture.

    Raises:
        DataError: the file or what lies beside it cannot be opened.
        InputError: FFCV is missing.
    """
    dataset = ffcv.open_betons(path)
    (split,) = dataset.splits.values()
    findings = []
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != split.rows[0].sha256:
            reason = f"{path}: the bytes do not match the sha256 of {path}.json; fetch it again or write it again"
            findings.append(Finding(path, WHOLE_SHARD, "", reason))
    edges = [split.samples * part // workers for part in range(workers + 1)]
    parts = [_Part(split, first, last, dataset.classes, dataset.label_kind, deep) for first, last in pairwise(edges)]
    read = list(spread(_read_part, parts, workers))
    findings += [finding for part in read for finding in part.findings]
    counts = tuple(Counter(finding.shard for finding in findings).items())
    problems = tuple(finding.reason for finding in findings)
    size, decoded = split.rows[0].bytes, sum(part.decoded for part in read)
    return Report(path, 1, split.samples, size, problems, tuple(findings), counts, decoded)


def _read_part(part: _Part) -> _Read:
    """What is wrong with a part of a .beton file."""
    split, findings, decoded = part.split, [], 0
    starts = np.cumsum(split.counts) - split.counts
    shards = ffcv.BetonShards(split)
    for index in range(part.first, part.last):
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        number, key = index - int(starts[shard]), ""
        try:
            sample = shards.read(shard, number, part.classes)
            key = sample.key
            if part.kind == "single" and len(sample.labels) != 1:
                raise DataError(f"{shards.where(shard, number)}: {len(sample.labels)} labels, must be one")
            if part.deep:
                decode_whole(sample.picture, shards.where(shard, number))
                decoded += 1
        except DataError as error:
            findings.append(Finding(split.rows[shard].path, number, key, str(error)))
    shards.close()
    return _Read(tuple(findings), decoded)
