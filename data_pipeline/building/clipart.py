"""Pictures that look like JFT in small: 6,900 clip-art PNGs of all sizes and colour modes, many labels, a hierarchy.

They are Debian's package openclipart-png, in the public domain. A picture's labels are its folder and all folders above
it (`food/fruit` also is `food`). The package links many pictures into several folders, and holds others twice under
other names: all copies, told by their pixels, become one picture with the labels of all its places, before the split.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import InputError
from data_pipeline.building.build import Picture, already_built, make_folder, split_of, write_dataset
from data_pipeline.decode import decode
from data_pipeline.errors import Damage
from data_pipeline.manifest import Dataset

PACKAGE = "openclipart-png"
ELSEWHERE = (
    f"take the package {PACKAGE} from a Debian mirror and give its .deb file, or the folder it was unpacked into: "
    "--source clipart PATH"
)
NO_LABELS = ("unsorted",)  # top folders that say nothing about what a picture shows
MIN_TRAIN, MIN_HELDOUT = 20, 3  # pictures of a class; rarer labels are left out: neither learned nor scored well
SHARD = 256  # samples: two dozen training shards, so that lanes and ranks have something to share
MAX_PIXELS = 100_000_000
MIN_SHORT_SIDE = 16
READERS = 2  # threads; a picture at the limit of pixels takes 1.5 GB while it is decoded


@dataclass(frozen=True)
class _Pixels:
    """What decoding a file gave: a hash of size and pixels, empty where it cannot be used, and the smaller picture."""

    content: str
    smaller: bytes | None = None  # PNG; None: the file is stored as it is


@dataclass(frozen=True)
class _Clip:
    """A picture, all its copies taken together: its pixels, a file that holds it, the labels of all its places."""

    pixels: _Pixels
    path: Path
    labels: frozenset[str]


def clipart(out: str | Path, source: str | Path = "", short_side: int = 0) -> Dataset:
    """The clip art as a data set of many labels; about 15 % held out by the hash of the pixels.

    Left out and counted in the data card: files that cannot be decoded or have more than 100 million pixels
    (`skipped`), labels of fewer than 20 training or 3 held-out pictures (`rare_labels`), pictures that keep no label
    (`unlabelled`).

    Args:
        out: folder to write to.
        source: the .deb file or a folder of PNG files; empty fetches the package with `apt-get download`.
        short_side: pixels; pictures with a larger one are stored at this size, encoded again; 0 keeps the files' bytes.

    Raises:
        InputError: no apt-get or dpkg-deb, no network, no such source or no pictures in it, a short side out of range,
            or `out` holds something else.
    """
    if short_side and short_side < MIN_SHORT_SIDE:
        raise InputError(f"--short-side {short_side}: must be 0 or at least {MIN_SHORT_SIDE}")
    foreign = Path(source).is_dir() if source else False
    rule = f"labels of {MIN_TRAIN} + {MIN_HELDOUT} pictures"
    origin: dict[str, object] = {
        "source": f"folder {Path(source).resolve().name}" if foreign else f"Debian package {PACKAGE}",
        "creation": f"clipart, {SHARD} samples a shard, {rule}, held out by hash of the pixels",
        "short_side": short_side,
    }
    if source:
        origin["sha256"] = _identity(Path(source))
    built = already_built(out, origin)
    if built:
        return built
    with _unpacked(Path(source) if source else None, Path(out)) as (folder, package):
        clips, skipped = _clips(folder, short_side)
        vocabulary = _vocabulary(clips)
        kept = [clip for clip in clips if clip.labels & vocabulary.keys()]
        labels = {label for clip in clips for label in clip.labels}
        left_out = {
            "skipped": skipped,
            "unlabelled": len(clips) - len(kept),
            "rare_labels": len(labels - vocabulary.keys()),
        }
        pictures = [_picture(clip, vocabulary) for clip in kept]
        return write_dataset(pictures, out, list(vocabulary), "multi", package | origin | left_out, SHARD)


def _identity(source: Path) -> str:
    """sha256 of a package file, or of a folder's listing: names, sizes and times.

    Raises:
        InputError: there is nothing at `source`.
    """
    if source.is_file():
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not source.is_dir():
        raise InputError(f"--source clipart {source}: no such file or folder; without a path the package is fetched")
    digest = hashlib.sha256()
    for path in _files(source):
        status = path.stat()
        line = f"{path.relative_to(source)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextmanager
def _unpacked(source: Path | None, out: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """The folder of pictures, and what the data card says of its origin. What is fetched or unpacked is deleted again.

    Raises:
        InputError: a tool is missing, or failed.
    """
    if source is not None and source.is_dir():
        yield source, {}
        return
    for tool in ("dpkg-deb",) if source is not None else ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise InputError(f"--source clipart: needs Debian's or Ubuntu's {tool}, which is not here; {ELSEWHERE}")
    make_folder(out.parent)
    # Beside the data set: there is room for 300 MB more, which a system's temporary folder may not have.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        root = Path(name)
        if source is None:
            _call(["apt-get", "download", PACKAGE], root, "`apt-get update` (as root) may help; else")
            source = next(root.glob("*.deb"))
        _call(["dpkg-deb", "--extract", str(source.resolve()), "files"], root, "is the file whole? Else")
        licence = "public domain dedication; see the package's copyright file"
        yield root / "files", {"package": source.name, "sha256": _identity(source), "licence": licence}


def _call(command: list[str], folder: Path, hint: str) -> None:
    """Run one tool in `folder`.

    Raises:
        InputError: it failed, with its own last words.
    """
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("W:")]
        raise InputError(f"`{' '.join(command)}` failed: {' '.join(said[-3:])}; {hint} {ELSEWHERE}")


def _files(folder: Path) -> list[Path]:
    """All PNG files below `folder` by name; links are taken only where they lead to a file inside it."""
    home = _real(folder)
    found = (path for path in sorted(folder.rglob("*.png")) if _real(path).is_relative_to(home))
    return [path for path in found if path.is_file()]


def _real(path: Path) -> Path:
    """The file behind links; unlike Path.resolve it bears links that lead to themselves."""
    return Path(os.path.realpath(path))


def _clips(folder: Path, short_side: int) -> tuple[list[_Clip], int]:
    """Every picture below `folder` once, and the number of different files that cannot be used.

    Raises:
        InputError: there are no PNG files.
    """
    places: dict[Path, list[Path]] = {}  # by file, links followed
    for path in _files(folder):
        places.setdefault(_real(path), []).append(path)
    if not places:
        raise InputError(f"{folder}: no PNG files in it; {ELSEWHERE}")
    home = Path(os.path.commonpath([path.parent for paths in places.values() for path in paths]))
    with ThreadPoolExecutor(READERS) as pool:
        decoded = dict(zip(places, pool.map(partial(_pixels, short_side=short_side), places), strict=True))
    copies: dict[str, list[Path]] = {}
    for file, pixels in decoded.items():
        if pixels.content:
            copies.setdefault(pixels.content, []).append(file)
    clips = []
    for files in copies.values():
        labels = {label for file in files for path in places[file] for label in _labels(path.relative_to(home).parent)}
        clips.append(_Clip(decoded[files[0]], files[0], frozenset(labels)))
    return clips, sum(not pixels.content for pixels in decoded.values())


def _pixels(path: Path, short_side: int) -> _Pixels:
    """Decode a file; with a `short_side` above 0 make a larger picture smaller while its pixels are at hand."""
    try:
        pixels_CHW = decode(path.read_bytes(), MAX_PIXELS)
    except Damage:
        return _Pixels("")  # counted in the data card
    pixels_HWC = np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())
    height, width = pixels_HWC.shape[:2]
    digest = hashlib.sha256(f"{height} x {width}".encode())
    digest.update(pixels_HWC.data)
    shrink = short_side / min(height, width) if short_side else 1.0
    if shrink >= 1:
        return _Pixels(digest.hexdigest())
    size = round(width * shrink), round(height * shrink)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC).save(file, format="PNG")
    return _Pixels(digest.hexdigest(), file.getvalue())


def _labels(folder: Path) -> list[str]:
    """A relative folder and those above it: a/b, a."""
    if not folder.parts or folder.parts[0] in NO_LABELS:
        return []
    return [str(Path(*folder.parts[:depth])) for depth in range(1, len(folder.parts) + 1)]


def _vocabulary(clips: list[_Clip]) -> dict[str, int]:
    """The labels with enough pictures in both splits, by name, with their numbers.

    Raises:
        InputError: there are none.
    """
    counts = {split: Counter[str]() for split in ("train", "heldout")}
    for clip in clips:
        counts[split_of(clip.pixels.content)].update(clip.labels)
    train, heldout = counts["train"], counts["heldout"]
    names = sorted(name for name, count in train.items() if count >= MIN_TRAIN and heldout[name] >= MIN_HELDOUT)
    if not names:
        raise InputError(
            f"{len(clips)} pictures: no folder holds {MIN_TRAIN} training and {MIN_HELDOUT} held-out ones; {ELSEWHERE}"
        )
    return {name: number for number, name in enumerate(names)}


def _picture(clip: _Clip, vocabulary: Mapping[str, int]) -> Picture:
    """The sample of a picture. Its key is readable and, by the hash, unique."""
    content, smaller = clip.pixels.content, clip.pixels.smaller
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", clip.path.stem)[:32]
    labels = tuple(sorted(vocabulary[label] for label in clip.labels & vocabulary.keys()))
    load = clip.path.read_bytes if smaller is None else partial(bytes, smaller)
    return Picture(f"{name}-{content[:12]}", "png", labels, content, load)
