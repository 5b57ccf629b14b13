"""The rows of a split, one per shard, kept in columns: 300,000 of them open in a fraction of a second.

Nothing is done row by row that 300,000 rows would make slow: checks and the fingerprint run over whole columns, and a
`Row` or a path is made when it is asked for. Only unusual paths, such as `./a.tar`, take the slow way.
"""

import hashlib
import io
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import PurePosixPath
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.store import join

SCHEMA = pa.schema(
    [("path", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())],
)
LIMIT = 2**48  # samples or bytes of a shard, far beyond any
SHA256 = re.compile("[0-9a-f]{64}")
PLAIN_PATH = r"^([^/\x00]+/)*[^/\x00]+\.tar$"  # of these only the ones without . and .. parts
DOTS = r"(^|/)\.\.?(/|$)"
UNQUOTED = r"^[ !#-\[\]-~]*$"  # what JSON writes as it is
CHUNK = 1 << 14  # rows turned into objects or bytes at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One shard: path relative to the data set's folder, number of samples, size of the tar in bytes, its sha256."""

    path: str
    samples: int
    bytes: int
    sha256: str


class Rows(Sequence[Row]):
    """The rows of a Parquet file, whose columns `SCHEMA` names."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, place: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return Row(*(column[place % len(self)].as_py() for column in self._table.columns))

    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self), CHUNK):
            yield from map(Row, *(column.to_pylist() for column in self._table.slice(first, CHUNK).columns))

    def counts(self) -> NDArray[np.int64]:
        """Samples of each shard, (shards,)."""
        counts: NDArray[np.int64] = self._table.column("samples").to_numpy().astype(np.int64)
        return counts

    def are_plain(self) -> bool:
        """Whether all rows pass `check_row` and name different shards, as far as a look at whole columns tells."""
        path, samples, size, sha256 = self._table.columns
        return bool(
            len(self) > 0
            and not any(column.null_count for column in self._table.columns)
            and all(0 < pc.min(numbers).as_py() <= pc.max(numbers).as_py() < LIMIT for numbers in (samples, size))
            and pc.all(pc.match_substring_regex(sha256, f"^{SHA256.pattern}$")).as_py()
            and pc.all(pc.match_substring_regex(path, PLAIN_PATH)).as_py()
            and not pc.any(pc.match_substring_regex(path, DOTS)).as_py()
            and (_ascending(path.chunk(0)) or pc.count_distinct(path).as_py() == len(self))
        )

    def canonical(self) -> Iterator[Any]:
        """The bytes that the fingerprint covers, in pieces: each row as a JSON list on a line of its own."""
        for first in range(0, len(self), CHUNK):
            part = self._table.slice(first, CHUNK).combine_chunks()
            columns = [column.chunk(0) for column in part.columns]
            texts = columns[0], columns[3]
            if any(column.null_count for column in columns) or not all(
                pc.all(pc.match_substring_regex(text, UNQUOTED)).as_py() for text in texts
            ):
                yield from map(canonical, Rows(part))
                continue
            path, samples, size, sha256 = (column.cast(pa.string()) for column in columns)
            line = '["', path, '", ', samples, ", ", size, ', "', sha256, '"]\n'
            written = pc.binary_join_element_wise(*line, "")
            edges = np.frombuffer(written.buffers()[1], dtype=np.int32, count=len(written) + 1)
            yield memoryview(written.buffers()[2])[edges[0] : edges[-1]]


class ShardPaths(Sequence[str]):
    """Where the shards of `rows` lie: their paths under a data set's root, be it a folder or a URL."""

    def __init__(self, root: str, rows: Sequence[Row]) -> None:
        self._root, self._rows = root, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        return join(self._root, str(PurePosixPath(self._rows[place].path)))

    def __iter__(self) -> Iterator[str]:
        return (join(self._root, str(PurePosixPath(row.path))) for row in self._rows)


class Joined(Sequence[T]):
    """Several sequences, one after the other, without a copy."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[T, ...]: ...
    def __getitem__(self, place: int | slice) -> T | tuple[T, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self._parts)


def read_rows(data: bytes, index: str) -> Rows:
    """The rows of the Parquet file whose bytes are `data`; `index` is for messages.

    Raises:
        DataError: it is no Parquet file of these columns.
    """
    try:
        # In this thread alone: threads that Arrow leaves behind can abort the process when it ends.
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        if table.schema.remove_metadata() != SCHEMA:
            raise DataError(f"{index}: columns must be {', '.join(str(field) for field in SCHEMA)}")
        table.validate(full=True)  # names that are not UTF-8, lengths that do not fit
        rows = Rows(table)
        pa.default_memory_pool().release_unused()  # twice as much as the rows take
        return rows
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{index}: damaged, not Parquet: {error}; build the data set again") from error


def pack_rows(rows: Sequence[Row]) -> bytes:
    """The Parquet file that lists `rows`."""
    columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names]
    file = io.BytesIO()
    pq.write_table(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA), file, compression="zstd")
    return file.getvalue()


def check_rows(rows: Rows, root: str, index: str) -> None:
    """Refuse rows whose numbers are out of range, whose paths leave the data set, or that name a shard twice.

    Raises:
        DataError: naming the first such row.
    """
    if rows.are_plain():
        return
    paths = {_check_row(row, root, index) for row in rows}
    if len(paths) != len(rows):
        raise DataError(f"{index}: lists a shard twice")


def inside(root: str, relative: object, suffix: str, where: str) -> str:
    """The file at `relative`, which must be a plain relative path with `suffix` that stays inside `root`.

    Raises:
        DataError: it is none.
    """
    pure = PurePosixPath(relative) if isinstance(relative, str) else PurePosixPath("/")
    if pure.is_absolute() or ".." in pure.parts or "\0" in str(pure) or pure.suffix != suffix:
        raise DataError(f"{where}: path {relative!r}: must be a relative path to a {suffix} file inside {root}")
    return join(root, str(pure))


def fingerprint(kind: str, vocabulary: Sequence[str], rows: Sequence[Row], label_field: str = "") -> str:
    """sha256, in hex, over the kind of labels, the vocabulary, where labels are, and the rows in canonical form."""
    labels = [kind, list(vocabulary), *([label_field] if label_field else [])]
    digest = hashlib.sha256(json.dumps(labels, ensure_ascii=True).encode())
    for piece in rows.canonical() if isinstance(rows, Rows) else map(canonical, rows):
        digest.update(piece)
    return digest.hexdigest()


def canonical(row: Row) -> bytes:
    """A row as a JSON list on a line of its own."""
    return json.dumps([row.path, row.samples, row.bytes, row.sha256], ensure_ascii=True).encode() + b"\n"


def _ascending(path: pa.Array) -> bool:
    """Whether each path comes after the one before it, as a build lists them: none can then come twice."""
    return bool(pc.all(pc.less(path.slice(0, len(path) - 1), path.slice(1))).as_py())


def _check_row(row: Row, root: str, index: str) -> str:
    """The path of a row's shard, whose numbers are in range."""
    path = inside(root, row.path, ".tar", index)
    numbers = (row.samples, row.bytes)
    if None in (*numbers, row.sha256) or not all(0 < n < LIMIT for n in numbers) or not SHA256.fullmatch(row.sha256):
        raise DataError(f"{index}: row {row}: samples and bytes must be positive, sha256 64 hex digits")
    return path
