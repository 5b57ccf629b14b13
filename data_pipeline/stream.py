"""Batches of a data set in the run's order, read by offset, through torch's DataLoader.

Loader processes are asked for ranges of global indices and return whole micro-batches, so what they deliver depends
neither on their number nor on the number of ranks. They keep no state: the cursor is counted by the trainer.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from configs.errors import InputError
from configs.schema import Run
from configs.tars import resampled
from data_pipeline import resample, synthetic
from data_pipeline.augment import check_mixing
from data_pipeline.batch import Batch
from data_pipeline.beton import is_beton
from data_pipeline.errors import DataError
from data_pipeline.ffcv import in_time
from data_pipeline.manifest import Dataset
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.reader import Part, Reader

__all__ = ["Batch", "heldout_loader", "open_data", "train_loader"]

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # the rank's affair, not its loader's


def open_data(run: Run) -> Dataset:
    """The data of a run: tars without an index (`resample`), or one of those that `synthetic.open_data` opens.

    Raises:
        InputError, DataError: see there.
    """
    return resample.resampled_dataset(run.data) if resampled(run.data) else synthetic.open_data(run)


def train_loader(
    dataset: Dataset,
    run: Run,
    order: Order | Mixture,
    slices: Sequence[tuple[int, int]],
    start: int,
    steps: int,
    part: Part = "all",
) -> Iterator[Batch]:
    """One rank's micro-batches for `steps` optimizer steps, from global sample index `start` on.

    Step s reads the global batch [start + s * B, start + (s + 1) * B), B = run.data.global_batch; its micro-step m
    takes the positions `slices[m]` inside it (`trainer.plan.Layout.slices`). They come in that order, as whole batches
    or as the `part` of them that a stage of a pipeline needs.

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
    kind = resample.Resampled if dataset.resampled else Reader
    return _batches(kind(dataset, split, run, order, part), ranges, run)


def heldout_loader(
    dataset: Dataset, split: str, run: Run, rank: int, world: int, part: Part = "all"
) -> Iterator[Batch]:
    """One rank's share of `split` in evaluation views, each sample exactly once over all ranks.

    Every rank gets equally many batches of one size, at most run.evaluate.micro_batch, because ranks that hold
    partitioned weights must run equally many forward passes. In pass s rank r reads the (s * world + r)-th chunk
    of the split; past its end the last sample is repeated with `valid_B` False. More ranks than samples is fine.
    """
    held_out = dataset.split(split)
    passes = -(-held_out.samples // (world * run.evaluate.micro_batch))
    chunk = -(-held_out.samples // (world * passes))
    ranges = _Ranges(0, world * chunk, ((rank * chunk, (rank + 1) * chunk),), passes)
    return _batches(Reader(dataset, held_out, run, None, part), ranges, run)


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
    """The batches of `ranges`; from FFCV's files the first one in time."""
    batches = _loaded(reader, ranges, run)
    return in_time(batches, run.data.path) if is_beton(run.data.path) else batches


def _loaded(reader: Reader, ranges: _Ranges, run: Run) -> Iterator[Batch]:
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
    # The server must outlive a scheduler's signals as its workers do: once it is gone, torch takes them for dead as
    # soon as a batch is five seconds late.
    multiprocessing.resource_tracker.ensure_running()  # else the server starts it, and that unblocks two of them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _start_worker(worker: int) -> None:
    """In a new worker: stopping is the parent's affair, and one core is what a worker is meant to use.

    A scheduler signals every process of a job. The rank answers by finishing its step and saving, for which it still
    needs its workers; they end when it tells them to, or with it.
    """
    for number in STOPPING:
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
