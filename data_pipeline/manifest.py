"""What a data set on disk consists of, checked before anything is read.

    DIR/manifest.json            form and version, data card, kind of labels, vocabulary, label counts, splits
    DIR/<split>.parquet          one row per shard: path (relative to DIR), samples, bytes, sha256
    DIR/<split>/shard-000000.tar and .idx      samples and sidecar (`data_pipeline.shard`)

manifest.json holds the checksum of each Parquet file, which holds those of the shards; the fingerprint of a split
covers its rows and the vocabulary. The label counts may be absent.
"""

import hashlib
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import InputError, unknown
from data_pipeline.errors import DataError
from data_pipeline.shard import OpenShards, sidecar_bytes, sidecar_path

__all__ = ["DataError", "Dataset", "Report", "Row", "Split", "open_dataset", "verify", "verify_command"]

FORMAT = "coatnet-shards"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26
SCHEMA = pa.schema(
    [("path", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())],
)

LabelKind = Literal["single", "multi"]


@dataclass(frozen=True)
class Row:
    """One shard: path relative to the data set's folder, number of samples, size of the tar in bytes, its sha256."""

    path: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Split:
    """One split, opened. Sidecars are read when a sample of their shard is."""

    name: str
    root: str
    samples: int
    counts: NDArray[np.int64]  # samples of each shard, (shards,)
    fingerprint: str  # sha256 over rows and vocabulary
    shard_paths: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, opened: every shard is known to exist with the size the manifest says."""

    root: str
    label_kind: LabelKind
    vocabulary: tuple[str, ...]
    card: Mapping[str, object]
    splits: Mapping[str, Split]
    label_counts: tuple[int, ...] | None = None  # training samples that carry each class; None: not counted
    synthetic: bool = False  # made up as it is read, from no files (`data_pipeline.synthetic`)

    @property
    def classes(self) -> int:
        """Number of classes: the length of the vocabulary."""
        return len(self.vocabulary)

    def split(self, name: str) -> Split:
        """The split `name`.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.splits and name in ("train", "heldout"):
            raise InputError(
                f"{self.root}: has no split {name!r}, only {', '.join(self.splits)}; build the data set again with both"
            )
        if name not in self.splits:
            raise unknown(f"split of {self.root}", name, self.splits)
        return self.splits[name]


@dataclass(frozen=True)
class Report:
    """What `verify` read, and what is wrong with it, one line per finding."""

    root: str
    shards: int
    samples: int
    bytes: int
    problems: tuple[str, ...]


def open_dataset(path: str | Path) -> Dataset:
    """The data set in folder `path`, its manifest checked and every shard found with its size.

    Raises:
        DataError: missing folder, missing, damaged or foreign manifest, missing or truncated shard.
    """
    root = Path(path)
    if not str(path) or "\0" in str(path) or not root.is_dir():
        raise DataError(
            f"data.path = {str(path)!r}: no such folder; `coatnet data demo --out DIR` makes a small data set"
        )
    content = _read_manifest(root / MANIFEST)
    where = str(root / MANIFEST)
    vocabulary, kind, card = content.get("vocabulary"), content.get("label_kind"), content.get("card")
    if not isinstance(vocabulary, list) or not vocabulary or not all(type(name) is str for name in vocabulary):
        raise DataError(f"{where}: vocabulary must be a list of names, one per class")
    if len(set(vocabulary)) != len(vocabulary):
        raise DataError(f"{where}: vocabulary names a class twice")
    if kind not in ("single", "multi"):
        raise DataError(f"{where}: label_kind = {kind!r}: must be 'single' or 'multi'")
    entries = content.get("splits")
    if not isinstance(card, dict) or not isinstance(entries, dict) or not entries:
        raise DataError(f"{where}: card and splits must be tables, splits not empty")
    counts = _label_counts(content.get("label_counts"), len(vocabulary), where)
    splits = {name: _open_split(root, name, entry, kind, vocabulary) for name, entry in entries.items()}
    return Dataset(str(root), kind, tuple(vocabulary), card, splits, counts)


def verify(path: str | Path) -> Report:
    """Read every byte again: shard checksums, sidecars, sample checksums, labels and their counts.

    Raises:
        DataError: the manifest itself cannot be opened (see `open_dataset`).
    """
    dataset = open_dataset(path)
    problems: list[str] = []
    for split in dataset.splits.values():
        shards = OpenShards(split.shard_paths, split.counts, limit=1)
        labels: Counter[int] = Counter()
        for number, row in enumerate(split.rows):
            try:
                problems += _verify_shard(dataset, shards, number, row, split.shard_paths[number], labels)
            except (DataError, OSError) as error:
                problems.append(str(error))
        shards.close()
        counts = tuple(labels[number] for number in range(dataset.classes))
        # Samples that could not be read were not counted either.
        if split.name == "train" and not problems and dataset.label_counts not in (None, counts):
            problems.append(
                f"{Path(dataset.root) / MANIFEST}: label_counts are not those of the samples; build the data set again"
            )
    rows = [row for split in dataset.splits.values() for row in split.rows]
    total = sum(row.samples for row in rows), sum(row.bytes for row in rows)
    return Report(dataset.root, len(rows), *total, tuple(problems))


def verify_command(path: str) -> str:
    """What `coatnet data verify DIR` prints.

    Raises:
        DataError: something is wrong; the message lists every finding.
    """
    report = verify(path)
    read = f"{report.root}: read {report.samples} samples in {report.shards} shards, {report.bytes / 1e6:.1f} MB"
    if report.problems:
        raise DataError("\n".join([f"{read}; {len(report.problems)} problems:", *report.problems]))
    return f"{read}; all checksums match"


def fingerprint(kind: str, vocabulary: Sequence[str], rows: Sequence[Row]) -> str:
    """sha256, in hex, over the kind of labels, the vocabulary and the rows in canonical form."""
    digest = hashlib.sha256(json.dumps([kind, list(vocabulary)], ensure_ascii=True).encode())
    for row in rows:
        digest.update(json.dumps([row.path, row.samples, row.bytes, row.sha256], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def pack_rows(rows: Sequence[Row]) -> bytes:
    """The Parquet file that lists `rows`."""
    columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names]
    file = io.BytesIO()
    pq.write_table(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA), file, compression="zstd")
    return file.getvalue()


def _read_manifest(path: Path) -> dict[str, object]:
    """The manifest's JSON object, of our form and version."""
    try:
        size = path.stat().st_size
        content = json.loads(path.read_bytes()) if size <= MAX_MANIFEST_BYTES else None
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no manifest: not a data set, or a build that was not finished; "
            f"`coatnet data demo --out {path.parent}` makes or completes the demo's"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged, not JSON: {error}; restore the file or build the data set again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of this trainer (format must be {FORMAT!r})")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise DataError(
            f"{path}: version {content.get('version')!r}, this trainer reads {VERSION}; build the data set again"
        )
    return content


def _label_counts(found: object, classes: int, where: str) -> tuple[int, ...] | None:
    """The manifest's label counts, one whole number >= 0 per class, or None where there are none."""
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != classes or not all(type(n) is int and n >= 0 for n in found):
        raise DataError(f"{where}: label_counts must be a list of {classes} whole numbers >= 0, one per class")
    return tuple(found)


def _open_split(root: Path, name: str, entry: object, kind: LabelKind, vocabulary: Sequence[str]) -> Split:
    """One split of the manifest: its Parquet file read and checked, its shards found on disk."""
    where = f"{root / MANIFEST}: split {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"samples", "shards", "index", "sha256", "fingerprint"}:
        raise DataError(f"{where}: must have samples, shards, index, sha256 and fingerprint, nothing else")
    index = _inside(root, entry["index"], ".parquet", where)
    try:
        data = Path(index).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{index!r}: cannot be read: {error}; fetch it again") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DataError(f"{index}: the bytes do not match the manifest's checksum; fetch both files again")
    try:
        # In this thread alone: threads that Arrow leaves behind can abort the process when it ends.
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        if table.schema.remove_metadata() != SCHEMA:
            raise DataError(f"{index}: columns must be {', '.join(str(field) for field in SCHEMA)}")
        rows = tuple(Row(**row) for row in table.to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{index}: damaged, not Parquet: {error}; build the data set again") from error
    paths = tuple(_check_row(root, row, index) for row in rows)
    counts = np.array([row.samples for row in rows], dtype=np.int64)
    if not rows:
        raise DataError(f"{where} is empty, {index} lists no shard; build the data set again with more pictures")
    if len(set(paths)) != len(paths):
        raise DataError(f"{index}: lists a shard twice")
    stated = (entry["samples"], entry["shards"], entry["fingerprint"])
    found = (int(counts.sum()), len(rows), fingerprint(kind, vocabulary, rows))
    if stated != found:
        raise DataError(f"{where}: says (samples, shards, fingerprint) = {stated}, {index} holds {found}")
    return Split(name, str(root), found[0], counts, found[2], paths, rows)


def _inside(root: Path, relative: object, suffix: str, where: str) -> str:
    """The file at `relative`, which must be a plain relative path with `suffix` that stays inside `root`."""
    pure = PurePosixPath(relative) if isinstance(relative, str) else PurePosixPath("/")
    if pure.is_absolute() or ".." in pure.parts or "\0" in str(pure) or pure.suffix != suffix:
        raise DataError(f"{where}: path {relative!r}: must be a relative path to a {suffix} file inside {root}")
    return str(root / pure)


def _check_row(root: Path, row: Row, index: str) -> str:
    """The path of a row's shard, whose numbers are in range and whose files exist with the right sizes."""
    path = _inside(root, row.path, ".tar", index)
    numbers = (row.samples, row.bytes)
    if None in (*numbers, row.sha256) or not all(0 < number < 2**48 for number in numbers) or len(row.sha256) != 64:
        raise DataError(f"{index}: row {row}: samples and bytes must be positive, sha256 64 hex digits")
    for file, size in ((path, row.bytes), (sidecar_path(path), sidecar_bytes(row.samples))):
        try:
            found = os.stat(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{file}: missing or unreadable ({error}); fetch it again or build the data set again"
            ) from error
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise DataError(f"{file}: {found.st_size} bytes, the manifest says {size}; fetch it again")
    return path


def _verify_shard(
    dataset: Dataset, shards: OpenShards, number: int, row: Row, path: str, labels: Counter[int]
) -> list[str]:
    """Findings in one shard; what its samples are labelled is counted in `labels`.

    Raises:
        DataError: its sidecar cannot be used.
    """
    problems = []
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != row.sha256:
            problems.append(f"{path}: the bytes do not match the manifest's sha256; fetch it again")
    opened = shards.get(number)
    for sample in range(row.samples):
        try:
            labels.update(set(opened.read(sample, dataset.classes).labels))
        except DataError as error:
            problems.append(str(error))
    return problems
