"""FFCV's .beton files (`data_pipeline.beton`), read in the run's order like the tars they were made from.

Sample i of the file is sample i of the split it was made from, shard by shard, so that an order over that split's
shards finds its samples. FFCV's reader finds the bytes of a sample; they are read by offset into memory of their own,
compared with crc32, and go the way of any other sample. FFCV's own loader has no part in it: it draws crops from
numpy's global generator, hands out memory that it writes to again, and waits for ever when its thread has failed.
The files are plain .beton files all the same, and that loader reads them.
"""

import json
import os
import re
import threading
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from configs.errors import InputError
from data_pipeline.batch import Batch
from data_pipeline.beton import FIELDS, Notes, check_header, checksum, is_beton, read_notes
from data_pipeline.errors import Damage, DataError, StoreError
from data_pipeline.manifest import Dataset, Split
from data_pipeline.members import Sample, labels_of
from data_pipeline.rows import Row
from data_pipeline.shard import MAX_SAMPLE_BYTES, OpenShard, OpenShards

__all__ = ["BetonShards", "in_time", "is_beton", "open_betons", "package", "split_of"]

FFCV = "1.0.2"  # whose writer and file format are known here
FIRST_BATCH = 300.0  # seconds until a first batch that has not come counts as never coming


class Package(NamedTuple):
    """The modules of FFCV that are used."""

    reader: Any
    writer: Any
    fields: Any
    allocator: Any


def package() -> Package:
    """FFCV, which is imported here and nowhere else.

    Raises:
        InputError: it cannot be imported, or is of another version.
    """
    advice = (
        f"before it, as root: `apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++`, because FFCV is "
        f"compiled from source; then `pip install -e '.[ffcv]'` (FFCV {FFCV}, numba, pillow). Or do without: give as "
        f"data.path the folder of the tars, which needs none of these and has the same transforms"
    )
    try:
        import ffcv.fields
        import ffcv.memory_allocator
        import ffcv.reader
        import ffcv.writer

        found = metadata.version("ffcv")  # its __version__ is another's
    except Exception as error:  # compiled packages that do not fit each other fail with more than ImportError
        raise InputError(f".beton files need FFCV, which cannot be imported ({error}); {advice}") from error
    if found != FFCV:
        raise InputError(f".beton files need FFCV {FFCV}, this is {found}; {advice}")
    return Package(ffcv.reader, ffcv.writer, ffcv.fields, ffcv.memory_allocator)


def open_betons(path: str) -> Dataset:
    """The data set in one .beton file, or in two of it joined by a comma: TRAIN.beton,HELDOUT.beton.

    Raises:
        InputError: FFCV is missing.
        DataError: a file is missing, not whole, or damaged at its head, or two do not belong together.
    """
    package()
    files = re.split(r"(?<=\.beton),", path)
    notes = {file: read_notes(file) for file in files}
    (first, one), *others = notes.items()
    for file, other in others:
        if (other.label_kind, other.vocabulary) != (one.label_kind, one.vocabulary):
            raise DataError(f"data.path = {path!r}: {first} and {file} have other classes; make both of one data set")
    splits = {other.split: split_of(file, other) for file, other in notes.items()}
    if len(splits) < len(files):
        raise DataError(f"data.path = {path!r}: two files of split {one.split!r}; give one of each split")
    return Dataset(path, one.label_kind, one.vocabulary, one.card, splits, one.label_counts)


def split_of(file: str, notes: Notes) -> Split:
    """The split that a file holds, its shards those of the data set it was made from."""
    rows = tuple(Row(path, samples, notes.bytes, notes.sha256) for path, samples in notes.shards)
    paths = tuple(f"{file}:{row.path}" for row in rows)
    counts = np.array([row.samples for row in rows], dtype=np.int64)
    return Split(notes.split, file, notes.samples, counts, notes.fingerprint, paths, rows)


class BetonShards(OpenShards):
    """The samples of a .beton file, asked for by the shards it was made from.

    Raises:
        InputError: FFCV is missing.
        DataError: the file is missing or its tables are damaged.
    """

    def __init__(self, split: Split) -> None:
        super().__init__(split.shard_paths, split.counts)
        self._file, self._rows, self._end = split.root, split.rows, 0
        self._starts = np.cumsum(split.counts) - split.counts
        check_header(self._file, split.samples, split.rows[0].bytes)
        try:
            found = package().reader.Reader(self._file)
            names = tuple(found.field_names)
            if names not in (FIELDS, FIELDS[:1] + FIELDS[2:]):
                raise DataError(f"fields {names}: must be {FIELDS}")
            columns = {name: found.metadata[f"f{place}"] for place, name in enumerate(names)}
            picture, notes = columns["image"]["data_ptr"], columns["sample"]
            places = np.sort(found.alloc_table, order="ptr")
            slot = np.minimum(np.searchsorted(places["ptr"], picture), len(places) - 1)
            sizes = np.where(places["ptr"][slot] == picture, places["size"][slot], 0)  # 0: refused when it is read
            # (n, 4): begin and bytes of the picture, begin and bytes of the JSON
            self._places = np.stack([picture, sizes, notes["ptr"], notes["size"]], axis=1).astype(np.uint64)
            self._labels, self._crcs = columns.get("label"), columns["crc32"].copy()
            self._end = int(found.header["alloc_table_ptr"])
            self._beton = open(self._file, "rb")  # noqa: SIM115 (closed by `close`)
        except InputError:
            raise
        except Exception as error:  # FFCV checks nothing: what damage leads to may be any error
            raise DataError(f"{self._file}: its tables cannot be read: {error}; write it again") from error

    def get(self, shard: int) -> OpenShard:
        """Refused: there are no tars.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self._file}: has no tars to look into; give the folder of the tars as data.path")

    def where(self, shard: int, number: int) -> str:
        """The place of a sample, for messages."""
        index = int(self._starts[shard]) + number
        return f"{self._file}: sample {index} ({self._rows[shard].path}:{number})"

    def read(self, shard: int, number: int, classes: int) -> Sample:
        """Sample `number` of shard number `shard`, a copy of the file's bytes, checked.

        Raises:
            Damage: naming the file and the sample.
            StoreError: the file system fails.
        """
        where, index = self.where(shard, number), int(self._starts[shard]) + number
        begin, size, notes_begin, notes_size = (int(edge) for edge in self._places[index])
        picture, notes = self._part(begin, size, where), self._part(notes_begin, notes_size, where)
        if checksum(index, picture, notes) != int(self._crcs[index]):
            raise Damage(f"{where}: the bytes do not match their checksum; fetch the file again or write it again")
        try:
            content = notes.rstrip(b"\0")
            labels, weights = labels_of({"json": content}, classes)
            key = json.loads(content)["key"]
        except (ValueError, LookupError) as error:
            raise Damage(f"{where}: {error}") from error
        if type(key) is not str or (self._labels is not None and labels != (int(self._labels[index]),)):
            raise Damage(f"{where}: key {key!r}: its label and its JSON differ; write the file again")
        return Sample(key, "jpg", picture, labels, weights)

    def _part(self, begin: int, size: int, where: str) -> bytes:
        """The file's bytes from `begin` on.

        Raises:
            Damage: outside of the samples, or not all there.
            StoreError: the file system fails.
        """
        if not 0 < size <= MAX_SAMPLE_BYTES or begin + size > self._end:
            raise Damage(f"{where}: its place in the file is damaged; fetch the file again or write it again")
        try:
            data = os.pread(self._beton.fileno(), size, begin)
        except OSError as error:
            raise StoreError(f"{where}: cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise Damage(f"{where}: the file ends after {len(data)} of its {size} bytes; fetch the file again")
        return data

    def close(self) -> None:
        """Close the file."""
        if self._end:
            self._end = 0
            self._beton.close()


def in_time(batches: Iterator[Batch], path: str, seconds: float = FIRST_BATCH) -> Iterator[Batch]:
    """The same batches, the first within `seconds`: FFCV compiles when it is imported, and has been seen to hang.

    Raises:
        DataError: while iterating: the first batch has not come in time.
    """
    found: list[Batch] = []
    problems: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def first() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread starts with the first GPU
            found.extend(islice(batches, 1))
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=first, daemon=True, name="first batch")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DataError(
            f"{path}: no batch within {seconds:g} s; FFCV or the file system hangs. Try --data.workers 0, or give the "
            f"folder of the tars as data.path"
        )
    if problems:
        raise problems[0]
    yield from found
    yield from batches
