"""Whole batches of one split: found in the run's order, read from their shards by offset, decoded, augmented."""

from collections.abc import Sequence

import numpy as np
import torch

from configs.schema import Run
from data_pipeline.augment import draw_mixing, eval_view, train_view
from data_pipeline.batch import Batch
from data_pipeline.decode import decode
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, Split
from data_pipeline.order import Ints, Order, sample_seed
from data_pipeline.shard import OpenShards
from data_pipeline.synthetic import NoisePool

_View = tuple[torch.Tensor, tuple[int, ...], str]  # uint8 (3, size, size), labels, key


class Reader(torch.utils.data.Dataset[Batch]):
    """Reads, decodes and augments whole batches of one split.

    With an `order`, indices are global sample indices of a training run; without, positions in the split.
    """

    def __init__(self, dataset: Dataset, split: Split, run: Run, order: Order | None) -> None:
        self._split, self._run, self._order = split, run, order
        self._classes, self._multi = dataset.classes, dataset.label_kind == "multi"
        self._starts = np.concatenate([[0], np.cumsum(split.counts)])
        self._synthetic = dataset.synthetic
        # Made where they are used: descriptors do not travel to loader processes, and pictures need not.
        self._shards: OpenShards | None = None
        self._noise: NoisePool | None = None

    def __len__(self) -> int:
        """Samples of the split."""
        return self._split.samples

    def __getitems__(self, indices: Sequence[int]) -> Batch | DataError:
        """The batch at `indices`. Damage is returned, not raised: torch would bury its message in a traceback."""
        try:
            return self._batch(np.asarray(indices, dtype=np.int64))
        except DataError as error:
            return error

    def _batch(self, indices_B: Ints) -> Batch:
        """The batch at `indices_B`, (B,); rows past the split's end repeat its last sample, marked invalid."""
        if self._order is not None:
            epoch, shard, sample = self._order.lookup(indices_B)
            seeds = sample_seed(self._order.seed, epoch, indices_B - epoch * self._split.samples)
            row, valid = np.arange(len(indices_B)), np.ones(len(indices_B), dtype=np.bool_)
        else:
            valid = indices_B < self._split.samples
            indices_B = np.minimum(indices_B, self._split.samples - 1)
            seeds = sample_seed(self._run.seed, np.zeros_like(indices_B), indices_B)
            once, row = np.unique(indices_B, return_inverse=True)  # padding is decoded once
            shard = np.searchsorted(self._starts, once, side="right") - 1
            sample = once - self._starts[shard]
        sample_of = self._made_up if self._synthetic else self._stored
        views, labels, keys = [], [], []
        for slot, (number, inside) in enumerate(zip(shard.tolist(), sample.tolist(), strict=True)):
            view, found, key = sample_of(number, inside, int(seeds[slot]))
            views.append(view)
            labels.append(found)
            keys.append(key)
        size = self._run.model.resolution
        mixing = draw_mixing(seeds.tolist(), size, self._run.augment) if self._order is not None else None
        return Batch(
            images_BCHW=torch.stack([views[slot] for slot in row]),
            labels=_label_tensor([labels[slot] for slot in row], self._multi),
            seeds_B=torch.from_numpy(seeds),
            indices_B=torch.from_numpy(indices_B),
            valid_B=torch.from_numpy(valid),
            keys=[keys[slot] for slot in row],
            kept_B=mixing[0] if mixing else None,
            boxes_B4=mixing[1] if mixing else None,
        )

    def _made_up(self, shard: int, number: int, seed: int) -> _View:
        """One sample of the synthetic data set."""
        if self._noise is None:
            self._noise = NoisePool(self._run.model.resolution, self._classes)
        picture_CHW, labels = self._noise.sample(seed)
        return torch.from_numpy(picture_CHW), labels, f"synthetic/{shard:04d}-{number:04d}"

    def _stored(self, shard: int, number: int, seed: int) -> _View:
        """One sample out of its shard.

        Raises:
            DataError: naming shard, sample, key and offset.
        """
        if self._shards is None:
            self._shards = OpenShards(self._split.shard_paths, self._split.counts)
        opened = self._shards.get(shard)
        stored = opened.read(number, self._classes)
        run, size = self._run, self._run.model.resolution
        where = f"{opened.path}: sample {number} at byte {int(opened.sidecar.offsets[number])}, key {stored.key!r}"
        if not self._multi and len(stored.labels) != 1:
            raise DataError(f"{where}: {len(stored.labels)} labels in a data set of single labels")
        try:
            image_CHW = decode(stored.picture, run.data.max_pixels)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if self._order is None:
            return eval_view(image_CHW, size, run.augment), stored.labels, stored.key
        return train_view(image_CHW, size, run.augment, seed), stored.labels, stored.key


def _label_tensor(labels: Sequence[tuple[int, ...]], multi: bool) -> torch.Tensor:
    """Labels as int64: (B,), or with `multi` (B, L) padded with -1."""
    if not multi:
        return torch.tensor([found[0] for found in labels], dtype=torch.int64)
    longest = max(1, *(len(found) for found in labels))
    return torch.tensor([[*found, *[-1] * (longest - len(found))] for found in labels], dtype=torch.int64)
