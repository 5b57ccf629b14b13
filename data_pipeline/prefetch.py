"""The shards of a split from wherever they lie, and those that a reader will need next, fetched meanwhile."""

import os
import threading
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Data
from data_pipeline.beton import is_beton
from data_pipeline.cache import Cache, cache_of
from data_pipeline.manifest import CHECKED_AT_ONCE, Split, check_files
from data_pipeline.members import Labelling
from data_pipeline.shard import OPEN_SHARDS, OpenShards, sidecar_path

Ints = NDArray[np.int64]

LOOKS = 32  # times that the order is asked where the reader will be, each about half a shard further on


class Order(Protocol):
    """What says where the samples at global indices lie: `data_pipeline.order.Order` or a mixture."""

    def lookup(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """(epoch, shard, sample in the shard) of each position."""


class Fetched:
    """The shards of a split that a process reads through the node's cache, or where they lie."""

    def __init__(self, split: Split, data: Data) -> None:
        self._split, self.counts = split, split.counts
        caches = {root: cache_of(data, root) for root in {source.root for source in split.sources} or {split.root}}
        first = [source.first_shard for source in split.sources] or [0]
        roots = [source.root for source in split.sources] or [split.root]
        self._caches = [caches[root] for root in roots]
        self._first = np.array(first, dtype=np.int64)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * max(1, data.workers)
        # Of the cache, half is for what the processes of the node have open and half for what they need next.
        self.share = data.cache_bytes // 2 // processes

    def open(self) -> OpenShards:
        """The split's shards, to be read in this process."""
        if is_beton(self._split.root):
            from data_pipeline.ffcv import BetonShards  # here, because it imports torch

            return BetonShards(self._split)
        paths, counts = self._split.shard_paths, self._split.counts
        if not any(self._caches):
            locate = self._in_place if len(paths) > CHECKED_AT_ONCE else None
            return OpenShards(paths, counts, locate=locate, labelling=self._labelling)
        largest = max(row.bytes for row in self._split.rows)
        limit = min(OPEN_SHARDS, max(8, self.share // largest))
        return OpenShards(paths, counts, limit, self.path, self._renew, self._labelling)

    def cached(self, shard: int) -> bool:
        """Whether the shard is read from the cache."""
        return self._cache(shard) is not None

    def bytes(self, shard: int) -> int:
        """Size of the shard's tar."""
        return self._split.rows[shard].bytes

    def path(self, shard: int) -> str:
        """The local path of a shard, fetched if need be.

        Raises:
            StoreError: it cannot be had.
        """
        cache = self._cache(shard)
        return cache.shard(*self._copy(shard)) if cache else self._in_place(shard)

    def _renew(self, shard: int) -> None:
        """See `OpenShards`."""
        cache = self._cache(shard)
        if cache:
            cache.renew(*self._copy(shard))

    def _labelling(self, shard: int) -> Labelling:
        """Where the labels of the shard's samples are."""
        if not self._split.sources:
            return self._split.labelling
        return self._split.sources[int(np.searchsorted(self._first, shard, side="right")) - 1].labelling

    def _cache(self, shard: int) -> Cache | None:
        """The cache that the shard's data set is read through; None: it is read where it lies."""
        return self._caches[int(np.searchsorted(self._first, shard, side="right")) - 1]

    def _copy(self, shard: int) -> tuple[str, str, int, int, str]:
        """What `Cache.shard` wants to know of a shard."""
        path, row = self._split.shard_paths[shard], self._split.rows[shard]
        return path, sidecar_path(path), row.samples, row.bytes, row.sha256

    def _in_place(self, shard: int) -> str:
        """The path of a shard in a folder, which was perhaps not looked for when the data set was opened."""
        check_files(self._split.shard_paths[shard], self._split.rows[shard])
        return self._split.shard_paths[shard]


class Ahead:
    """Fetches, in a thread of the reader's process, the shards that it will need next, within its share of the cache.

    Args:
        fetched: the shards.
        order: of a training run; None: shards are read one after the other.
        batch: positions from one batch of this reader's positions to the next.
    """

    def __init__(self, fetched: Fetched, order: Order | None, batch: int) -> None:
        self._fetched, self._order, self._batch = fetched, order, batch
        self._wanted: list[int] = []
        # By place in the batch, since a process may read several slices in turn: the shards that follow, and the
        # position from which on the order is asked again.
        self._following: dict[int, list[int]] = {}
        self._again: dict[int, int] = {}
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    def after(self, positions_B: Ints, shards_B: Ints) -> None:
        """Say which `positions_B` of the run, (B,), the reader reads now and in which shards they lie."""
        first, counts = int(positions_B[0]), self._fetched.counts
        here = np.unique(shards_B)
        if self._order is None:
            self.want(range(int(here[-1]) + 1, min(int(here[-1]) + 3, len(counts))))
            return
        slot = first % self._batch
        if first < self._again.get(slot, -1):
            return
        # Of each of its shards, a batch reads about len(positions_B) / len(here) samples.
        pace = max(1, int(counts[here].mean() * len(here) / (2 * len(positions_B))))
        self._again[slot] = first + pace * self._batch
        looks = positions_B[None, :] + self._batch * pace * np.arange(1, LOOKS + 1)[:, None]
        self._following[slot] = list(dict.fromkeys(self._order.lookup(looks.reshape(-1))[1].tolist()))
        in_turn = chain.from_iterable(zip_longest(*self._following.values()))
        self.want([shard for shard in in_turn if shard is not None])

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these shards, soonest needed first, as far as the share goes; in place of what was wanted before."""
        wanted, room = [], self._fetched.share
        for shard in dict.fromkeys(shards):
            if not self._fetched.cached(shard):
                continue
            room -= self._fetched.bytes(shard)
            if room < 0:
                break
            wanted.append(shard)
        with self._news:
            self._wanted = wanted
            self._news.notify()
        if wanted and self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")
            self._thread.start()

    def _work(self) -> None:
        """Fetch what is wanted, one shard after the other, for ever."""
        while True:
            with self._news:
                while not self._wanted:
                    self._news.wait()
                shard = self._wanted.pop(0)
            try:
                self._fetched.path(shard)  # one that is here already counts as just used, so that it stays
            except InputError:
                continue  # the reader will ask for it, fail likewise, and say so
