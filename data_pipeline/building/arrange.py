"""The examined pictures put in order: copies made one, labels to indices, splits, the order over all shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.errors import InputError
from data_pipeline.building.labels import Labels, kind_of, understand
from data_pipeline.manifest import LabelKind

TASK_COLUMNS = ("key", "place", "offset", "bytes", "extension", "content")
LABELS = pa.list_(pa.int32())

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Arranged:
    """Pictures in order. `rows` are row numbers of `found` by split; `merged` the labels of pictures with copies."""

    found: pa.Table
    rows: Mapping[str, Rows]
    merged: Mapping[int, tuple[str, ...]]
    kind: LabelKind
    labels: Labels
    counts: Mapping[str, int]  # listed, unreadable, duplicates, conflicting
    problems: tuple[str, ...]

    def table(self, rows: Rows) -> pa.Table:
        """The pictures in `rows` as a task reads them: TASK_COLUMNS, and `labels` as indices."""
        chosen = self.found.take(pa.array(rows))
        words = [
            self.merged.get(row, found) for row, found in zip(rows.tolist(), chosen["labels"].to_pylist(), strict=True)
        ]
        of = lru_cache(maxsize=100_000)(self.labels.of)
        labels = pa.array([of(tuple(found)) for found in words], type=LABELS)
        return chosen.select(list(TASK_COLUMNS)).append_column("labels", labels)


def arrange(
    examined: pa.Table, wanted: str, given: Sequence[str], parents: Mapping[str, Sequence[str]], share: float
) -> Arranged:
    """Put the pictures of an examined source in order.

    Pictures of the same bytes become one: the held-out one if there is one, else the first of the order, with the
    labels of all in a data set of several labels. In one of single labels copies that disagree are counted.

    Args:
        examined: `data_pipeline.building.examine.EXAMINED`.
        wanted: kind of labels: auto, single, multi.
        given: the vocabulary; empty: from the labels.
        parents: of each class that has any.
        share: of the pictures, by hash of their content, that is held out.

    Raises:
        InputError: no picture can be used, or see `labels.understand` and `labels.kind_of`.
    """
    problems = tuple(pc.filter(examined["problem"], pc.not_equal(examined["problem"], "")).to_pylist())
    found = examined.filter(pc.equal(examined["problem"], "")).drop_columns(["problem"]).combine_chunks()
    counts = {"listed": examined.num_rows, "unreadable": len(problems)}
    if not found.num_rows:
        raise InputError(f"none of {examined.num_rows} pictures can be used: {'; '.join(problems[:5])}")
    turn, heldout = found["turn"].to_numpy(), found["heldout"].to_numpy()
    codes = found["content"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    order = np.lexsort((turn, ~heldout)).astype(np.int64)
    kept = order[np.unique(codes[order], return_index=True)[1]]
    kept = kept[np.argsort(turn[kept], kind="stable")]
    if np.unique(turn[kept]).size != kept.size:
        raise InputError("two pictures have the same key: a file changed while it was read; plan again")
    several = _several(found, order[(np.bincount(codes) > 1)[codes[order]]], codes)
    one_each = bool(pc.all(pc.equal(pc.list_value_length(found["labels"]), 1)).as_py()) and not parents
    long_form = any(len(set(group)) > len({key for key, _ in group}) for _, group in several)  # a row for each label
    kind = kind_of(wanted, one_each and not long_form)
    labels = understand(pc.unique(pc.list_flatten(found["labels"])).to_pylist(), given, parents)
    union = {row: tuple(dict.fromkeys(word for _, words in group for word in words)) for row, group in several}
    conflicting = sum(len({labels.of(words) for _, words in group}) > 1 for _, group in several)
    counts |= {"duplicates": found.num_rows - int(kept.size), "conflicting": conflicting}
    drawn = np.frombuffer(b"".join(found["content"].to_pylist()), dtype=">u4").reshape(-1, 8)[:, 0]
    out = heldout | (drawn < share * 2**32)
    rows = {"train": kept[~out[kept]], "heldout": kept[out[kept]]}
    return Arranged(found, rows, union if kind == "multi" else {}, kind, labels, counts, problems)


_Group = tuple[int, list[tuple[str, tuple[str, ...]]]]


def _several(found: pa.Table, rows: Rows, codes: NDArray[np.int32]) -> list[_Group]:
    """Pictures that come several times: the row that stays, and (key, labels) of all; `rows` in the order."""
    groups: dict[int, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(int(codes[row]), []).append(row)
    keys, words = found["key"], found["labels"]
    return [(same[0], [(keys[row].as_py(), tuple(words[row].as_py())) for row in same]) for same in groups.values()]
