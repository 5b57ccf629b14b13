"""A made-up data set in ImageNet-1k's size, without files: shows a machine's speed and fit before any data are there.

Pictures are noise from a small pool, at the size the network takes, so that reading costs next to nothing: no
decoding, no crop, no RandAugment (mixtures, which the device computes, stay). Which picture and which label a position
gets follows from its seed alone, so the same batches come at any number of ranks and workers.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from configs.data_rules import mixture_entry
from configs.errors import InputError
from configs.schema import Run
from data_pipeline.beton import is_beton
from data_pipeline.manifest import Dataset, Split, open_dataset
from data_pipeline.merge import merge

# (shards, samples in each): close to ImageNet-1k's 1.28M training pictures; lanes and pieces work as on real shards.
SHARDS = {"train": (1250, 1024), "heldout": (10, 1000)}
POOL = 32  # pictures, 5 MB at 224 pixels


def open_data(run: Run) -> Dataset:
    """The data of a run: the data set in `run.data.path`, those of `run.data.mixture` as one, or the made-up one.

    A path that ends in .beton is FFCV's (`data_pipeline.ffcv`).

    Raises:
        DataError: see `data_pipeline.manifest.open_dataset`.
        InputError: see `data_pipeline.merge.merge` and `data_pipeline.ffcv.open_betons`.
    """
    if run.data.synthetic:
        return synthetic_dataset(run.data.synthetic_classes)
    if run.data.mixture:
        paths, weights = zip(*map(mixture_entry, run.data.mixture), strict=True)
        if any(map(is_beton, paths)):
            raise InputError(f"data.mixture = {run.data.mixture}: .beton files cannot be mixed; give folders of tars")
        return merge([open_dataset(path, run.data) for path in paths], weights)
    if is_beton(run.data.path):
        from data_pipeline.ffcv import open_betons  # here, because it imports torch

        if run.data.cache:
            raise InputError(f"data.cache = {run.data.cache!r}: a .beton is read where it lies; leave it empty")
        return open_betons(run.data.path)
    return open_dataset(run.data.path, run.data)


def synthetic_dataset(classes: int) -> Dataset:
    """The made-up data set, single labels. The label counts are what to expect: all are equally likely."""
    splits = {}
    for name, (shards, each) in SHARDS.items():
        counts = np.full(shards, each, dtype=np.int64)
        identity = hashlib.sha256(f"synthetic {name} {shards} x {each}, {classes} classes".encode()).hexdigest()
        splits[name] = Split(name, "synthetic", shards * each, counts, identity, (), ())
    vocabulary = tuple(f"class {number}" for number in range(classes))
    expected = (splits["train"].samples // classes,) * classes
    card = {"source": "synthetic", "creation": f"noise, {POOL} pictures"}
    return Dataset("synthetic", "single", vocabulary, card, splits, expected, synthetic=True)


class NoisePool:
    """The pictures of one process. The same in every process: they are drawn from a fixed seed.

    Args:
        size: pixels of a side.
        classes: labels are from 0 to `classes` - 1.
    """

    def __init__(self, size: int, classes: int) -> None:
        self._classes = classes
        pictures = np.random.default_rng(0).integers(0, 256, (POOL, 3, size, size), dtype=np.uint8)
        # Colours side by side in memory, as decoders leave them: what the device makes of a batch then costs as much.
        self._pictures = np.ascontiguousarray(pictures.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    def sample(self, seed: int) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
        """The picture, uint8 (3, size, size), not to be written to, and the label that belong to a position's seed."""
        return self._pictures[seed % POOL], (seed // POOL % self._classes,)
