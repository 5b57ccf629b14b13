"""Batches of a data set in the run's order, read by offset, through torch's DataLoader.

Loader processes are asked for ranges of global indices and return whole micro-batches, so what they deliver depends
neither on their number nor on the number of ranks. They keep no state: the cursor is counted by the trainer.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from configs.errors import InputError
from configs.schema import Run
from data_pipeline.augment import check_mixing, draw_mixing, eval_view, train_view
from data_pipeline.batch import Batch
from data_pipeline.decode import decode
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, Split
from data_pipeline.order import Ints, Order, sample_seed
from data_pipeline.shard import OpenShards
from data_pipeline.synthetic import NoisePool, open_data

__all__ = ["Batch", "heldout_loader", "open_data", "train_loader"]


def train_loader(
    dataset: Dataset, run: Run, order: Order, slices: Sequence[tuple[int, int]], start: int, steps: int
) -> Iterator[Batch]:
    """One rank's micro-batches for `steps` optimizer steps, from global sample index `start` on.

    Step s reads the global batch [start + s * B, start + (s + 1) * B), B = run.data.global_batch; its micro-step m
    takes the positions `slices[m]` inside it (`trainer.plan.Layout.slices`). They come in that order.

    Raises:
        InputError: a slice outside the batch, or one that parts a mixing pair.
        DataError: while iterating: a damaged shard or sample, named.
    """
    batch = run.data.global_batch
    for first, last in slices:
        if not 0 <= first < last <= batch:
            raise InputError(f"slice [{first}, {last}): must lie inside the global batch of {batch} samples")
    check_mixing(run.augment, slices)
    split = dataset.split("train")
    if order.counts.shape != split.counts.shape or (order.counts != split.counts).any():
        raise InputError(f"the order was made for other shards than {split.root}'s split {split.name!r}")
    ranges = _Ranges(start, batch, tuple(slices), steps)
    return _batches(Reader(dataset, split, run, order), ranges, run)


def heldout_loader(dataset: Dataset, split: str, run: Run, rank: int, world: int) -> Iterator[Batch]:
    """One rank's share of `split` in evaluation views, each sample exactly once over all ranks.

    Every rank gets equally many batches of one size, at most run.evaluate.micro_batch, because ranks that hold
    partitioned weights must run equally many forward passes. In pass s rank r reads the (s * world + r)-th chunk
    of the split; past its end the last sample is repeated with `valid_B` False. More ranks than samples is fine.
    """
    part = dataset.split(split)
    passes = -(-part.samples // (world * run.evaluate.micro_batch))
    chunk = -(-part.samples // (world * passes))
    ranges = _Ranges(0, world * chunk, ((rank * chunk, (rank + 1) * chunk),), passes)
    return _batches(Reader(dataset, part, run, None), ranges, run)


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


class _Ranges:
    """The ranges of global indices that one rank reads, in order: `slices` of each of `steps` batches from `start`."""

    def __init__(self, start: int, batch: int, slices: tuple[tuple[int, int], ...], steps: int) -> None:
        self._start, self._batch, self._slices, self._steps = start, batch, slices, steps

    def __len__(self) -> int:
        return self._steps * len(self._slices)

    def __iter__(self) -> Iterator[range]:
        for step in range(self._steps):
            first = self._start + step * self._batch
            for low, high in self._slices:
                yield range(first + low, first + high)


def _batches(reader: Reader, ranges: _Ranges, run: Run) -> Iterator[Batch]:
    """The batches of `ranges`, prepared ahead by run.data.workers processes (0: in this one)."""
    workers = run.data.workers
    loader: DataLoader[Batch] = DataLoader(
        reader,
        batch_sampler=cast("torch.utils.data.Sampler[list[int]]", ranges),
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=run.cluster.device != "cpu" and torch.cuda.is_available(),
        generator=torch.Generator(),  # torch would else draw from, and so disturb, the run's global generator
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    """The reader already returns whole batches, where torch expects a list of samples."""
    return batch


def _context() -> BaseContext:
    """How workers start: by forkserver, else spawn; a fork would inherit the parent's GPU, threads and signals."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.stream"])  # imported once, not once per worker
    return context


def _start_worker(worker: int) -> None:
    """In a new worker: stopping is the parent's affair, and one core is what a worker is meant to use.

    A scheduler signals every process of a job. The rank answers by finishing its step and saving, for which it still
    needs its workers; they end when it tells them to, or with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """In a worker's own thread: exit when the process that reads its batches is gone, however it went.

    torch's check compares the parent's process id. Under forkserver that is the server, which in turn lives until the
    last of its workers is gone, so that after a kill -9 of the rank they would keep each other alive for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _label_tensor(labels: Sequence[tuple[int, ...]], multi: bool) -> torch.Tensor:
    """Labels as int64: (B,), or with `multi` (B, L) padded with -1."""
    if not multi:
        return torch.tensor([found[0] for found in labels], dtype=torch.int64)
    longest = max(1, *(len(found) for found in labels))
    return torch.tensor([[*found, *[-1] * (longest - len(found))] for found in labels], dtype=torch.int64)
