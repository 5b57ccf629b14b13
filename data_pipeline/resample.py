"""Tars without an index, read as webdataset's users do: shards drawn at random, for ever. Not exact.

`data.path = "tars:PATTERN"`. PATTERN is what webdataset expands: braces such as /data/train-{000..146}.tar, several
parts joined by `::`, http(s)://, s3://, gs:// and pipe: URLs, which webdataset's own commands open; and *, ? and [...]
in the names of local files. What is held out, the names of the classes and the kind of labels come from the data set
in `data.heldout`; `data.tar_samples` says how many samples count as an epoch.

What this mode does not do, and a data set made by `coatnet data adopt` does:

- There is no order. Every loader process draws tars with repetition and shuffles their samples in a buffer of BUFFER.
  An epoch sees some samples several times and others never, and other ranks or workers see other ones.
- A run that continues draws anew, from the seed and the step it continues at, and keeps no place inside a tar.
- Bytes have no checksum: webdataset ends a tar that is garbled between two samples there without an error.

Only members with a picture's extension, `cls` and `json` are read. Nothing is unpickled, and none of webdataset's
decoders is used. Views are drawn from the sample's place in the run, as everywhere.
"""

import glob
import hashlib
import os
import tarfile
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import webdataset
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from configs.errors import InputError
from configs.schema import Data, Run
from configs.tars import TARS
from data_pipeline.augment import train_view
from data_pipeline.decode import decode
from data_pipeline.errors import Damage, DataError
from data_pipeline.manifest import MAKERS, Dataset, Split, open_dataset
from data_pipeline.members import LABEL_EXTENSIONS, PICTURE_EXTENSIONS, Sample, labels_of
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.permutation import STREAMS, Ints, keyed
from data_pipeline.reader import Part, Reader, _View
from data_pipeline.store import is_url

BUFFER = 1000  # samples that are shuffled together, undecoded
BARREN = 100  # tars in a row without any sample, or samples in a row that are damaged, until a run stops
BRACES = 1_000_000  # tars that a pattern may stand for


def resampled_dataset(data: Data) -> Dataset:
    """The tars of `data.path` as the training split of the data set in `data.heldout`.

    To who counts, the split is one shard of `data.tar_samples`; its fingerprint is that of the pattern.

    Raises:
        InputError: the pattern stands for nothing, or for files that are not there.
        DataError: see `open_dataset`.
    """
    if not is_url(data.heldout) and not os.path.isdir(data.heldout):
        raise InputError(f"data.heldout = {data.heldout!r}: no such folder; {MAKERS}")
    held = open_dataset(data.heldout, data)
    urls = expand(data.path.removeprefix(TARS))
    identity = hashlib.sha256(f"{data.path}, {data.tar_samples}, {held.vocabulary}".encode()).hexdigest()
    counts = np.array([data.tar_samples], dtype=np.int64)
    train = Split("train", data.path, data.tar_samples, counts, identity, urls, ())
    splits = {"train": train, "heldout": held.split("heldout")}
    card = {"source": f"{len(urls)} tars, resampled", "heldout": dict(held.card)}
    return Dataset(data.path, held.label_kind, held.vocabulary, card, splits, resampled=True)


def notice(dataset: Dataset) -> str:
    """What is said when a run starts."""
    return (
        f"{len(dataset.split('train').shard_paths):,} tars are drawn at random with repetition: NOT exact. An epoch "
        f"repeats some samples and misses others, and a run that continues draws anew; `coatnet data adopt` indexes "
        f"tars for the exact order"
    )


def expand(pattern: str) -> list[str]:
    """The tars that a pattern stands for.

    Raises:
        InputError: none, too many, or local files that are not there.
    """
    try:
        listed = expand_urls(pattern)
    except ValueError as error:  # braces that do not match, or a variable of webdataset's that is not set
        raise InputError(f"data.path = {TARS + pattern!r}: cannot be expanded: {error}") from error
    found: list[str] = []
    for url in listed:
        remote = "://" in url or url.startswith("pipe:")
        matching = [url] if remote or os.path.isfile(url) else sorted(filter(os.path.isfile, glob.glob(url)))
        if not matching:
            raise InputError(f"data.path = {TARS + pattern!r}: {url}: no such file, and no file matches it")
        found += matching
        if len(found) > BRACES:
            raise InputError(f"data.path = {TARS + pattern!r}: stands for more than {BRACES} tars; name fewer")
    return found


class Resampled(Reader):
    """Whole batches of samples drawn from tars; the indices only say where in the run they are used."""

    def __init__(self, dataset: Dataset, split: Split, run: Run, order: Order | Mixture, part: Part = "all") -> None:
        super().__init__(dataset, split, run, order, part)
        self._drawn: Iterator[dict[str, Any]] | None = None  # made in the process that draws
        self._reading = ""  # the tar that is read, for messages

    def _look_ahead(self, positions: Ints, shards: Ints) -> None:
        """Begin to draw. Who else begins with this position is to read the same: another stage of a pipeline."""
        if self._drawn is None:
            (key,) = keyed(STREAMS, self._run.seed, positions[:1])
            self._drawn = self._shuffled(int(key >> np.uint64(1)))

    def _view(self, index: int, shard: int, number: int, seed: int) -> _View:
        """The next sample drawn, in the view that belongs to its place in the run.

        Raises:
            DataError: damaged, and the run is to stop for it; or a tar cannot be read.
        """
        assert self._drawn is not None
        for _ in range(BARREN):
            found = self._next()
            try:
                sample = self._sample(found)
                image_CHW = decode(sample.picture, self._run.data.max_pixels)
            except Damage as error:
                where = f"{found['__url__']}: sample {found['__number__']}, key {found['__key__']!r}"
                self._damaged(found["__url__"], found["__number__"], Damage(f"{where}: {error}", found["__key__"]))
                continue
            view_CHW = train_view(image_CHW, self._run.model.resolution, self._run.augment, seed)
            return _View(view_CHW, sample.labels, sample.weights, sample.key)
        raise DataError(f"{self._split.root}: {BARREN} damaged samples in a row; {self._bad.path} lists them")

    def _next(self) -> dict[str, Any]:
        """The next sample as webdataset gives it: bytes by extension.

        Raises:
            DataError: a tar cannot be opened, or read to its end.
        """
        assert self._drawn is not None
        try:
            return next(self._drawn)
        except DataError:
            raise
        except Exception as error:  # of commands, sockets and tar files, for which webdataset has no family of its own
            said = " ".join(str(part) for part in error.args)
            raise DataError(
                f"{self._split.root}: {type(error).__name__}: {said}; restore the tar, or with data.on_damage replace "
                f"do without what cannot be read of it"
            ) from error

    def _shuffled(self, key: int) -> Iterator[dict[str, Any]]:
        """webdataset's pipeline: tars resampled, opened, grouped into samples, shuffled. Without end."""
        shards = webdataset.ResampledShards(
            list(self._split.shard_paths), seed=key, worker_seed=lambda: 0, deterministic=True
        )
        shuffled: Iterator[dict[str, Any]] = webdataset.shuffle(BUFFER, rng=Random(key))(self._samples(shards))
        return shuffled

    def _samples(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The samples of tars, numbered in each.

        Raises:
            DataError: so many tars in a row hold none that there may be none at all.
        """
        barren = 0
        for shard in shards:
            number, self._reading = -1, shard["url"]
            files = tar_file_expander(url_opener([shard]), handler=self._torn, select_files=_wanted)
            for number, sample in enumerate(group_by_keys(files, handler=self._torn)):
                yield sample | {"__number__": number}
            if "stream" in shard:
                shard["stream"].close()
            barren = 0 if number >= 0 else barren + 1
            if barren == BARREN:
                raise DataError(
                    f"{self._split.root}: the last {BARREN} tars read hold no sample, such as {shard['url']}"
                )

    def _torn(self, error: Exception) -> bool:
        """webdataset's question whether to go on after a tar that cannot be read to its end."""
        if self._run.data.on_damage == "stop" or not isinstance(error, (tarfile.TarError, ValueError, EOFError)):
            raise error  # a store that fails is not damage
        self._bad.note(self._reading, -1, Damage(f"{self._reading}: {error.args[0]}"))
        return True

    def _damaged(self, url: str, number: int, damage: Damage) -> None:
        """A sample that cannot be used: stop, or write it down and draw another."""
        if self._run.data.on_damage == "stop":
            raise damage
        self._bad.note(url, number, damage)

    def _sample(self, found: dict[str, Any]) -> Sample:
        """A sample out of the members that webdataset read.

        Raises:
            Damage: not one picture, or no labels that are understood.
        """
        pictures = [extension for extension in PICTURE_EXTENSIONS if extension in found]
        if len(pictures) != 1:
            raise Damage(f"needs one member of {PICTURE_EXTENSIONS}, has {pictures}")
        contents = {name: found[name] for name in LABEL_EXTENSIONS if name in found}
        labels, weights = labels_of(contents, self._classes)
        if not self._multi and len(labels) != 1:
            raise Damage(f"{len(labels)} labels beside a held-out split of single labels")
        return Sample(found["__key__"], pictures[0], found[pictures[0]], labels, weights)


def _wanted(name: str) -> bool:
    """Whether a member of a tar is read."""
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    return extension in (*PICTURE_EXTENSIONS, *LABEL_EXTENSIONS)
