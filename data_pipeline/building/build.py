"""Writing a data set: shuffled over all shards, byte-equal when repeated, never whole-looking before it is whole."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from data_pipeline.building.writing import MAX_KEY, TEMPORARY, Encoded, write_shard, write_whole
from data_pipeline.errors import DataError
from data_pipeline.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    Dataset,
    LabelKind,
    Row,
    fingerprint,
    open_dataset,
    pack_rows,
)
from data_pipeline.shard import PICTURE_EXTENSIONS

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.15
CARD = "CARD.md"  # the data card for people; the manifest has it for programs
CARD_HEADING = "# Data card of a coatnet data set"  # tells it from a file of the user's
BUILD = ".coatnet-build"  # folder of a distributed build (`data_pipeline.building.tasks`), deleted when it is finished
SHARD_FILE = re.compile(r"shard-\d{6,}\.(tar|idx)(\.partial.*)?$")


@dataclass(frozen=True)
class Picture:
    """One sample to be written.

    Args:
        key: unique, no dot in its last part, at most 90 ASCII characters.
        extension: jpg, jpeg, png or webp.
        labels: indices into the vocabulary; exactly one in a data set of single labels.
        group: pictures of one group fall into the same split (the content's hash keeps copies together).
        load: reads the encoded bytes, when their turn comes.
    """

    key: str
    extension: str
    labels: tuple[int, ...]
    group: str
    load: Callable[[], bytes]


def write_dataset(
    pictures: Sequence[Picture],
    out: str | Path,
    vocabulary: Sequence[str],
    label_kind: LabelKind,
    card: Mapping[str, object],
    shard_samples: int,
) -> Dataset:
    """Write `pictures` as a data set into folder `out`, the manifest last, and open it.

    The order over all shards is that of the keys' hashes, and every shard of a split but the last holds
    `shard_samples`. An unfinished build in `out` is started again.

    Raises:
        InputError: keys or labels break the rules above, a split would be empty, or `out` is in use or not ours.
    """
    _check(pictures, vocabulary, label_kind, shard_samples)
    root = Path(out)
    with claimed(root):
        rows = {}
        for split in SPLITS:
            chosen = sorted((p for p in pictures if split_of(p.group) == split), key=lambda p: _hash(p.key))
            if not chosen:
                raise InputError(f"{root}: {len(pictures)} pictures leave the split {split!r} empty; take more")
            rows[split] = list(_write_shards(root, split, chosen, label_kind, shard_samples))
        write_manifest(root, rows, label_kind, vocabulary, _label_counts(pictures, len(vocabulary)), card)
    return open_dataset(root)


def already_built(out: str | Path, origin: Mapping[str, object]) -> Dataset | None:
    """The data set in `out` if it is whole and its card has all of `origin`; None if there is none or a part is gone.

    Args:
        out: folder.
        origin: entries of the data card, JSON values, that together settle what a build would write.

    Raises:
        InputError: `out` holds another data set, or something else; nothing is ever overwritten.
    """
    root = Path(out)
    if not (root / MANIFEST).exists():
        foreign = sorted(path.name for path in root.iterdir() if not _ours(path)) if root.is_dir() else []
        if foreign or (root.exists() and not root.is_dir()):
            raise InputError(f"{root}: holds other things ({', '.join(foreign[:3])}); choose an empty or new folder")
        return None
    try:
        made_from = dict(json.loads((root / MANIFEST).read_bytes())["card"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{root / MANIFEST}: cannot be read ({error}); delete the folder or choose another") from error
    if any(made_from.get(name) != value for name, value in origin.items()):
        stated = {name: value for name, value in made_from.items() if name in origin}
        raise InputError(f"{root}: holds another data set, made from {stated}; delete the folder or choose another")
    try:
        return open_dataset(root)
    except DataError:
        return None  # of the same origin but incomplete: the caller builds it again


def write_manifest(
    root: Path,
    rows: Mapping[str, Sequence[Row]],
    label_kind: LabelKind,
    vocabulary: Sequence[str],
    label_counts: Sequence[int],
    card: Mapping[str, object],
    label_field: str = "",
) -> None:
    """Write what makes `root` a data set: a Parquet file for each split's `rows`, and the manifest last.

    Args:
        root: the folder, where all shards are already.
        rows: by split.
        label_kind: of the whole data set.
        vocabulary: names of the classes.
        label_counts: how many training pictures carry each class, (classes,).
        card: the data card, JSON values.
        label_field: of the `json` members, where the labels are not in a usual place.
    """
    entries = {}
    for split, listed in rows.items():
        index = pack_rows(listed)
        write_whole(root / f"{split}.parquet", index)
        entries[split] = {
            "samples": sum(row.samples for row in listed),
            "shards": len(listed),
            "index": f"{split}.parquet",
            "sha256": hashlib.sha256(index).hexdigest(),
            "fingerprint": fingerprint(label_kind, vocabulary, listed, label_field),
        }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "card": dict(card),
        "label_kind": label_kind,
        "vocabulary": list(vocabulary),
        "label_counts": list(label_counts),
        **({"label_field": label_field} if label_field else {}),
        "splits": entries,
    }
    write_whole(root / MANIFEST, json.dumps(content, indent=1).encode())


def shard_name(split: str, number: int) -> str:
    """The path of shard `number` of a split, relative to the data set's folder."""
    return f"{split}/shard-{number:06d}.tar"


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        InputError: the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}; choose another folder with --out") from error


def split_of(group: str) -> str:
    """The split of a group: held-out for about 15 % of all hashes (HELDOUT_SHARE)."""
    return "heldout" if int(_hash(group)[:8], 16) < HELDOUT_SHARE * 2**32 else "train"


def _check(pictures: Sequence[Picture], vocabulary: Sequence[str], label_kind: LabelKind, shard_samples: int) -> None:
    """Refuse what could be written but not read again."""
    if shard_samples < 1:
        raise InputError(f"samples per shard = {shard_samples}: must be at least 1; nearest valid: 1")
    if not vocabulary or len(set(vocabulary)) != len(vocabulary):
        raise InputError("vocabulary: must name each class once, and one at least")
    seen: set[str] = set()
    for picture in pictures:
        key, last = picture.key, picture.key.rpartition("/")[2]
        if key in seen or not last or "." in last or len(key) > MAX_KEY or not key.isascii() or not key.isprintable():
            raise InputError(
                f"key {key!r}: must be unique, at most {MAX_KEY} ASCII characters, no dot in its last part"
            )
        seen.add(key)
        if picture.extension not in PICTURE_EXTENSIONS:
            raise InputError(f"key {key!r}: extension {picture.extension!r}: must be one of {PICTURE_EXTENSIONS}")
        if not all(0 <= label < len(vocabulary) for label in picture.labels):
            raise InputError(f"key {key!r}: labels {picture.labels}: must be from 0 to {len(vocabulary) - 1}")
        if label_kind == "single" and len(picture.labels) != 1:
            raise InputError(f"key {key!r}: {len(picture.labels)} labels in a data set of single labels")
        if len(set(picture.labels)) != len(picture.labels):
            raise InputError(f"key {key!r}: labels {picture.labels}: must not name a class twice")


def _label_counts(pictures: Sequence[Picture], classes: int) -> list[int]:
    """How many training pictures carry each label, (classes,)."""
    counts = [0] * classes
    for picture in pictures:
        if split_of(picture.group) == "train":
            for label in picture.labels:
                counts[label] += 1
    return counts


@contextmanager
def claimed(root: Path, clear: bool = True) -> Iterator[None]:
    """`root` made, held by this process alone and, with `clear`, rid of an earlier build, its manifest first.

    Raises:
        InputError: another process holds it, or it has things that no build made.
    """
    make_folder(root)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{root}: another process is building here; wait for it") from error
        for path in sorted(root.iterdir()):
            if not _ours(path):
                raise InputError(f"{root}: holds other things ({path.name}); choose an empty or new folder")
        if clear:
            (root / MANIFEST).unlink(missing_ok=True)
            os.fsync(descriptor)
            for path in sorted(root.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(descriptor)


def _ours(path: Path) -> bool:
    """Whether a build made this entry of its folder. A folder `train` of anything but shards is not ours."""
    name = path.name.partition(TEMPORARY)[0]
    if name in SPLITS:
        return path.is_dir() and all(SHARD_FILE.match(entry.name) for entry in path.iterdir())
    if name == CARD:
        with path.open("rb") as file:
            return file.readline().strip() == CARD_HEADING.encode()
    return name in (*(f"{split}.parquet" for split in SPLITS), MANIFEST, BUILD)


def _write_shards(root: Path, split: str, pictures: Sequence[Picture], kind: LabelKind, size: int) -> Iterator[Row]:
    """Write one split's shards and sidecars, one after the other."""
    (root / split).mkdir()
    for number, first in enumerate(range(0, len(pictures), size)):
        chosen = pictures[first : first + size]
        samples = (Encoded(picture.key, picture.extension, picture.load(), picture.labels) for picture in chosen)
        yield write_shard(root, shard_name(split, number), samples, kind)


def _hash(text: str) -> str:
    """sha256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
