"""Several opened data sets as one: the data set of a mixture, its label space merged by the classes' names.

Equal names are one class, in the order in which the data sets name them first. Data sets of single labels make one of
single labels; with one of several labels among them they make one of several. The training split is the mixture's
(`data_pipeline.mixture`); another split is what the data sets that have it hold, one after the other.
"""

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_pipeline.manifest import Dataset, LabelKind, Source, Split
from data_pipeline.rows import Joined

Tables = Sequence[tuple[int, ...]]  # for each data set the merged number of each of its classes


def merge(datasets: Sequence[Dataset], weights: Sequence[int]) -> Dataset:
    """The data set that a mixture of `datasets` is, each with its weight.

    Raises:
        InputError: one has no training split, or two are the same.
    """
    vocabulary = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.vocabulary))
    number = {name: index for index, name in enumerate(vocabulary)}
    tables = [tuple(number[name] for name in dataset.vocabulary) for dataset in datasets]
    seen: dict[str, str] = {}
    for dataset in datasets:
        same = seen.setdefault(dataset.split("train").fingerprint, dataset.root)
        if same != dataset.root:
            raise InputError(f"data.mixture: {dataset.root} and {same} are the same data set; name it once")
    kind: LabelKind = "multi" if any(dataset.label_kind == "multi" for dataset in datasets) else "single"
    names = dict.fromkeys(name for dataset in datasets for name in dataset.splits)
    lowest = [weight // math.gcd(*weights) for weight in weights]
    splits = {name: _merged(name, datasets, lowest, tables) for name in names}
    root = " + ".join(f"{dataset.root}:{weight}" for dataset, weight in zip(datasets, weights, strict=True))
    card = {"source": "mixture", "mixture": {dataset.root: dict(dataset.card) for dataset in datasets}}
    counts = _expected(datasets, weights, tables, len(vocabulary))
    return Dataset(root, kind, vocabulary, card, splits, counts)


def _merged(name: str, datasets: Sequence[Dataset], weights: Sequence[int], tables: Tables) -> Split:
    """The split `name` of all data sets that have it."""
    parts = [
        (dataset, dataset.splits[name], weight, table)
        for dataset, weight, table in zip(datasets, weights, tables, strict=True)
        if name in dataset.splits
    ]
    sources, first = [], 0
    for dataset, split, weight, table in parts:
        identity = dataset.root, weight, split.samples, split.fingerprint
        sources.append(Source(first, dataset.classes, table, *identity, labelling=split.labelling))
        first += len(split.counts)
    splits = [split for _, split, _, _ in parts]
    canonical = json.dumps([[source.fingerprint, source.translate] for source in sources])
    return Split(
        name=name,
        root=" + ".join(split.root for split in splits),
        samples=sum(split.samples for split in splits),
        counts=np.concatenate([split.counts for split in splits]),
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest(),
        shard_paths=Joined([split.shard_paths for split in splits]),
        rows=Joined([split.rows for split in splits]),
        sources=tuple(sources),
    )


def _expected(
    datasets: Sequence[Dataset], weights: Sequence[int], tables: Tables, classes: int
) -> tuple[int, ...] | None:
    """How many training samples carry each class, in as many draws from the mixture as it has samples; None: unknown.

    It is what the classifier starts from (`trainer.engine.network.head_bias`), so it follows the weights, not the
    sizes.
    """
    draws = sum(dataset.split("train").samples for dataset in datasets)
    expected: NDArray[np.float64] = np.zeros(classes)
    for dataset, weight, table in zip(datasets, weights, tables, strict=True):
        if dataset.label_counts is None:
            return None
        share = np.array(dataset.label_counts) / dataset.split("train").samples
        expected[list(table)] += draws * weight / sum(weights) * share
    return tuple(round(value) for value in expected.tolist())
