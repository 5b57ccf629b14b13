"""Whole batches of one split: found in the run's order, read from their shards by offset, decoded, augmented."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from configs.schema import Run
from data_pipeline.augment import draw_mixing, eval_view, train_view
from data_pipeline.batch import Batch
from data_pipeline.damage import BadSamples, stand_ins
from data_pipeline.decode import decode
from data_pipeline.errors import Damage, DataError
from data_pipeline.manifest import Dataset, Split
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order, sample_seed
from data_pipeline.permutation import Ints
from data_pipeline.prefetch import Ahead, Fetched
from data_pipeline.shard import OpenShards
from data_pipeline.synthetic import NoisePool

Part = Literal["all", "labels", "seeds"]  # of a batch: everything, all but the pictures, what the order says


class _View(NamedTuple):
    """A sample as the network sees it; not `valid` where an evaluation has to do without it."""

    picture_CHW: torch.Tensor  # uint8 (3, size, size)
    labels: tuple[int, ...]
    weights: tuple[float, ...]
    key: str
    valid: bool = True


class Reader(torch.utils.data.Dataset[Batch]):
    """Reads, decodes and augments whole batches of one split.

    With an `order`, indices are global sample indices of a training run; without, positions in the split.

    Not every stage of a pipeline needs all of a batch (`Part`). One that needs the labels only does not decode, unless
    the run replaces damaged samples: which ones are damaged shows when they are decoded, and all stages must agree.
    """

    def __init__(
        self, dataset: Dataset, split: Split, run: Run, order: Order | Mixture | None, part: Part = "all"
    ) -> None:
        self._split, self._run, self._order, self._part = split, run, order, part
        self._classes, self._multi = dataset.classes, dataset.label_kind == "multi"
        self._starts = np.concatenate([[0], np.cumsum(split.counts)])
        self._first_shards = np.array([source.first_shard for source in split.sources], dtype=np.int64)
        self._synthetic = dataset.synthetic
        self._bad = BadSamples(run.folder, run.data.damage_budget)
        # Made where they are used: descriptors and threads do not travel to loader processes, and pictures need not.
        self._shards: OpenShards | None = None
        self._ahead: Ahead | None = None
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
            once, row, valid = indices_B, np.arange(len(indices_B)), np.ones(len(indices_B), dtype=np.bool_)
        else:
            valid = indices_B < self._split.samples
            indices_B = np.minimum(indices_B, self._split.samples - 1)
            seeds = sample_seed(self._run.seed, np.zeros_like(indices_B), indices_B)
            once, row = np.unique(indices_B, return_inverse=True)  # padding is decoded once
            shard = np.searchsorted(self._starts, once, side="right") - 1
            sample = once - self._starts[shard]
        if self._part == "seeds":
            return _only_seeds(seeds, indices_B, valid)
        if not self._synthetic:
            self._look_ahead(once, shard)
        places = zip(once.tolist(), shard.tolist(), sample.tolist(), strict=True)
        found = [self._view(*place, int(seeds[slot])) for slot, place in enumerate(places)]
        views = [found[slot] for slot in row]
        size = self._run.model.resolution
        mixing = draw_mixing(seeds.tolist(), size, self._run.augment) if self._order is not None else None
        labels, weights = _label_tensors(views, self._multi)
        return Batch(
            images_BCHW=self._stacked([view.picture_CHW for view in views]),
            labels=labels,
            seeds_B=torch.from_numpy(seeds),
            indices_B=torch.from_numpy(indices_B),
            valid_B=torch.from_numpy(valid & np.array([view.valid for view in views])),
            keys=[view.key for view in views],
            kept_B=mixing[0] if mixing else None,
            boxes_B4=mixing[1] if mixing else None,
            weights_BL=weights,
        )

    def _stacked(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pictures (3, H, W) as one tensor, in the memory format in which they are: see `augment.train_view`."""
        if not self._synthetic and self._order is not None and self._run.augment.randaugment_layers:
            return torch.stack(list(pictures))
        return torch.stack([picture.permute(1, 2, 0) for picture in pictures]).permute(0, 3, 1, 2)

    def _look_ahead(self, positions: Ints, shards: Ints) -> None:
        """Open what this process reads from, and have fetched what it will need next."""
        if self._shards is None or self._ahead is None:
            fetched = Fetched(self._split, self._run.data)
            self._shards = fetched.open()
            self._ahead = Ahead(fetched, self._order, self._run.data.global_batch)
        self._ahead.after(positions, shards)

    def _view(self, index: int, shard: int, number: int, seed: int) -> _View:
        """The sample at `index`, which is `number` of its shard, or what takes its place if it is damaged.

        Raises:
            DataError: damaged, and the run is to stop for it.
        """
        if self._synthetic:
            return self._made_up(shard, number, seed)
        try:
            return self._stored(shard, number, seed)
        except Damage as damage:
            if self._run.data.on_damage == "stop":
                raise
            self._bad.note(self._split.shard_paths[shard], number, damage)
        if self._order is None:  # no score for what cannot be seen
            size = self._run.model.resolution
            return _View(torch.zeros(3, size, size, dtype=torch.uint8), () if self._multi else (0,), (), "", False)
        for place in stand_ins(index, self._order.samples, self._order.seed):
            _, (other,), (sample,) = self._order.lookup(np.array([place]))
            try:
                return self._stored(int(other), int(sample), seed)
            except Damage as damage:
                self._bad.note(self._split.shard_paths[int(other)], int(sample), damage)
        raise DataError(
            f"{self._split.shard_paths[shard]}: sample {number} is damaged, and so is everything that may stand in for "
            f"it; {self._bad.path} lists them; repair the shards"
        )

    def _made_up(self, shard: int, number: int, seed: int) -> _View:
        """One sample of the synthetic data set."""
        if self._noise is None:
            self._noise = NoisePool(self._run.model.resolution, self._classes)
        picture_CHW, labels = self._noise.sample(seed)
        return _View(torch.from_numpy(picture_CHW), labels, (), f"synthetic/{shard:04d}-{number:04d}")

    def _stored(self, shard: int, number: int, seed: int) -> _View:
        """One sample out of its shard.

        Raises:
            Damage: naming shard, sample, key and offset.
            DataError: the shard cannot be read.
        """
        assert self._shards is not None
        source = None
        if self._split.sources:
            source = self._split.sources[int(np.searchsorted(self._first_shards, shard, side="right")) - 1]
        stored = self._shards.read(shard, number, source.classes if source else self._classes)
        labels = tuple(source.translate[label] for label in stored.labels) if source else stored.labels
        run, size = self._run, self._run.model.resolution
        try:
            if not self._multi and len(labels) != 1:
                raise Damage(f"{len(labels)} labels in a data set of single labels")
            if self._part == "labels" and run.data.on_damage == "stop":
                return _View(torch.empty(3, 0, 0, dtype=torch.uint8), labels, stored.weights, stored.key)
            image_CHW = decode(stored.picture, run.data.max_pixels)
        except DataError as error:
            where = f"{self._shards.where(shard, number)}, key {stored.key!r}"
            if isinstance(error, Damage):
                raise Damage(f"{where}: {error}", stored.key) from error
            raise DataError(f"{where}: {error}") from error
        if self._order is None:
            view_CHW = eval_view(image_CHW, size, run.augment)
        else:
            view_CHW = train_view(image_CHW, size, run.augment, seed)
        return _View(view_CHW, labels, stored.weights, stored.key)


def _only_seeds(seeds_B: Ints, indices_B: Ints, valid_B: NDArray[np.bool_]) -> Batch:
    """A batch of which nothing was read."""
    return Batch(
        images_BCHW=torch.empty(len(seeds_B), 3, 0, 0, dtype=torch.uint8),
        labels=torch.empty(len(seeds_B), 0, dtype=torch.int64),
        seeds_B=torch.from_numpy(seeds_B),
        indices_B=torch.from_numpy(indices_B),
        valid_B=torch.from_numpy(valid_B),
        keys=[],
    )


def _label_tensors(views: Sequence[_View], multi: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels as int64, (B,), or with `multi` (B, L) padded with -1; and float32 weights, (B, L), if any are soft."""
    longest = max(1, *(len(view.labels) for view in views)) if multi else 1
    labels_BL = torch.tensor(
        [[*view.labels, *[-1] * (longest - len(view.labels))] for view in views], dtype=torch.int64
    )
    weights_BL = None
    if any(view.weights for view in views):
        rows = [view.weights or (1.0,) * len(view.labels) for view in views]
        weights_BL = torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows], dtype=torch.float32)
    return labels_BL if multi else labels_BL[:, 0], weights_BL
