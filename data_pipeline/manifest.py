"""What a data set on disk consists of, checked before anything is read.

    DIR/manifest.json            form and version, data card, kind of labels, vocabulary, label counts, splits;
                                 of adopted tars with labels in an unusual place, label_field
    DIR/<split>.parquet          one row per shard: path (relative to DIR), samples, bytes, sha256
    DIR/<split>/shard-000000.tar and .idx      samples and sidecar (`data_pipeline.shard`)

DIR is a folder, or a URL, whose manifest and Parquet files are then fetched and whose shards are when they are read.
manifest.json holds the checksum of each Parquet file, which holds those of the shards; the fingerprint of a split
covers its rows and the vocabulary. The label counts may be absent.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, unknown
from configs.schema import Data
from data_pipeline.cache import Cache, cache_of
from data_pipeline.errors import DataError, StoreError
from data_pipeline.members import PLAIN, Labelling
from data_pipeline.rows import Row, ShardPaths, check_rows, fingerprint, inside, pack_rows, read_rows
from data_pipeline.shard import sidecar_bytes, sidecar_path
from data_pipeline.store import check_root, is_url, join, read_small

__all__ = ["DataError", "Dataset", "Row", "Split", "fingerprint", "open_dataset", "pack_rows"]

FORMAT = "coatnet-shards"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26
CHECKED_AT_ONCE = 1000  # shards of a folder that are looked for when it is opened
MAKERS = (
    "`coatnet data build SOURCE --out DIR` makes a data set of pictures, `coatnet data adopt TAR ... --out DIR` of "
    "existing WebDataset tars, `coatnet data demo --out DIR` a small one"
)

LabelKind = Literal["single", "multi"]


@dataclass(frozen=True)
class Source:
    """One data set inside the split of a mixture (`data_pipeline.mixture`)."""

    first_shard: int  # number of its first shard among all shards of the split
    classes: int  # of its own vocabulary, in which the labels in its shards are numbered
    translate: tuple[int, ...]  # class of the mixture for each of its own, (classes,)
    root: str = ""
    weight: int = 1  # its positions in every cycle of the mixture; weights are in lowest terms
    samples: int = 0
    fingerprint: str = ""  # of its own split
    labelling: Labelling = field(default=PLAIN, compare=False)  # part of the fingerprint


@dataclass(frozen=True, eq=False)
class Split:
    """One split, opened. Sidecars are read when a sample of their shard is."""

    name: str
    root: str
    samples: int
    counts: NDArray[np.int64]  # samples of each shard, (shards,)
    fingerprint: str  # sha256 over rows and vocabulary
    shard_paths: Sequence[str]
    rows: Sequence[Row]
    sources: tuple[Source, ...] = ()  # of a mixture, in the order of their shards; empty: one data set alone
    labelling: Labelling = PLAIN  # of one data set alone


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
    resampled: bool = False  # the training split is tars without an index (`data_pipeline.resample`)

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
                f"{self.root}: has no split {name!r}, only {', '.join(self.splits)}; build it again with both, "
                f"or of .beton files give both: TRAIN.beton,HELDOUT.beton"
            )
        if name not in self.splits:
            raise unknown(f"split of {self.root}", name, self.splits)
        return self.splits[name]


def open_dataset(path: str | Path, data: Data | None = None, look: bool = True) -> Dataset:
    """The data set in folder or at URL `path`, its manifest checked.

    The shards of a folder with up to CHECKED_AT_ONCE are looked for here; those of a larger one, or behind a URL, when
    they are first read, because so many questions can take a network file system many minutes.

    Args:
        path: of the data set.
        data: how a URL is fetched and where its files are kept; None: the defaults.
        look: for the shards of a small folder; without, a missing one is found when it is read.

    Raises:
        DataError: missing folder, missing, damaged or foreign manifest, missing or truncated shard.
        InputError: a URL of another form, or a store whose package is not installed.
    """
    data = data or Data()
    root = check_root(str(path), data.pipe) if is_url(str(path)) else str(Path(path))
    if not is_url(root) and (not str(path) or "\0" in root or not os.path.isdir(root)):
        raise DataError(f"data.path = {str(path)!r}: no such folder; {MAKERS}")
    cache = cache_of(data, root)
    where = join(root, MANIFEST)
    content = _read_manifest(where, cache)
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
    label_field = content.get("label_field", "")
    if not isinstance(label_field, str) or ("label_field" in content and not label_field):
        raise DataError(f"{where}: label_field = {label_field!r}: must be the name of a field of the json members")
    labelling = Labelling(label_field, {name: number for number, name in enumerate(vocabulary)} if label_field else {})
    labels: tuple[LabelKind, list[str], Labelling] = ("single" if kind == "single" else "multi", vocabulary, labelling)
    splits = {name: _open_split(root, name, entry, labels, cache) for name, entry in entries.items()}
    if look and not is_url(root):
        for split in splits.values():
            _look(split)
    return Dataset(root, kind, tuple(vocabulary), card, splits, counts)


def _read_manifest(path: str, cache: Cache | None) -> dict[str, object]:
    """The manifest's JSON object, of our form and version."""
    try:
        if cache and is_url(path):
            data = read_small(path, cache.patience)
        else:
            with open(path, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        content = json.loads(data) if len(data) <= MAX_MANIFEST_BYTES else None
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no manifest: not a data set, or a build that was not finished, which the same command finishes; "
            f"{MAKERS}"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
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


def _open_split(
    root: str, name: str, entry: object, labels: tuple[LabelKind, Sequence[str], Labelling], cache: Cache | None
) -> Split:
    """One split of the manifest, whose `labels` are of that kind, vocabulary and place: its Parquet file checked."""
    kind, vocabulary, labelling = labels
    where = f"{join(root, MANIFEST)}: split {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"samples", "shards", "index", "sha256", "fingerprint"}:
        raise DataError(f"{where}: must have samples, shards, index, sha256 and fingerprint, nothing else")
    index = inside(root, entry["index"], ".parquet", where)
    try:
        data = cache.index(index, str(entry["sha256"])) if cache and is_url(index) else Path(index).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise DataError(f"{index!r}: cannot be read: {error}; fetch it again") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DataError(f"{index}: the bytes do not match the manifest's checksum; fetch both files again")
    rows = read_rows(data, index)
    if not rows:
        raise DataError(f"{where} is empty, {index} lists no shard; build the data set again with more pictures")
    check_rows(rows, root, index)
    counts, paths = rows.counts(), ShardPaths(root, rows)
    stated = (entry["samples"], entry["shards"], entry["fingerprint"])
    found = (int(counts.sum()), len(rows), fingerprint(kind, vocabulary, rows, labelling.field))
    if stated != found:
        raise DataError(f"{where}: says (samples, shards, fingerprint) = {stated}, {index} holds {found}")
    return Split(name, root, found[0], counts, found[2], paths, rows, labelling=labelling)


def _look(split: Split) -> None:
    """Find the shards of a split in a folder, if they are few.

    Raises:
        StoreError: see `check_files`.
    """
    if len(split.rows) <= CHECKED_AT_ONCE:
        for path, row in zip(split.shard_paths, split.rows, strict=True):
            check_files(path, row)


def check_files(path: str, row: Row) -> None:
    """Find a shard in a folder, and its sidecar, with the sizes that its row says.

    Raises:
        StoreError: one is missing or of another size.
    """
    for file, size in ((path, row.bytes), (sidecar_path(path), sidecar_bytes(row.samples))):
        try:
            found = os.stat(file)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{file}: missing or unreadable ({error}); fetch it again or build the data set again"
            ) from error
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise StoreError(f"{file}: {found.st_size} bytes, the manifest says {size}; fetch it again")
