"""The tasks of a planned build, and their end: each writes its own shards, alone, again if need be, to the same bytes.

A shard is finished when its record is there, which is written after the tar and its sidecar; a task that was killed
goes on behind its last record. Every picture is decoded before it is written. One that turns out unreadable is left
out, if the plan allows it, and the next takes its place: all shards of a task but its last hold equally many samples.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from configs.errors import InputError
from configs.schema import Data
from data_pipeline.building.build import BUILD, CARD, claimed, shard_name, write_manifest
from data_pipeline.building.card import card_page, summary
from data_pipeline.building.download import Unreachable, download
from data_pipeline.building.examine import UNKNOWN, picture_format
from data_pipeline.building.plan import Options, Plan, Task, Tell, plan, read_plan, read_table
from data_pipeline.building.workers import spread
from data_pipeline.building.writing import Encoded, is_aside, write_shard, write_whole
from data_pipeline.decode import decode
from data_pipeline.errors import Damage
from data_pipeline.manifest import MANIFEST, Dataset, Row, open_dataset
from data_pipeline.shard import sidecar_bytes, sidecar_path

SIDES = (64, 128, 256, 384, 512, 1024, 2048)  # pixels: bounds of the statistics of short sides
Picked = Mapping[str, object]


@dataclass
class Record:
    """What a shard holds: its row, where its task goes on, and statistics.

    A task's last record may have no row: pictures behind its last shard that all were unreadable.
    """

    row: dict[str, object] | None
    next: int  # index in the task of the first picture that this shard does not hold
    labels: dict[str, int] = field(default_factory=dict)  # pictures by class; JSON has no other keys than words
    formats: dict[str, int] = field(default_factory=dict)
    sides: dict[str, int] = field(default_factory=dict)  # pictures by least bound of SIDES above their short side
    resized: int = 0
    skipped: list[str] = field(default_factory=list)  # why, for each picture left out
    fetched: list[str] = field(default_factory=list)  # hashes of pictures from URLs, which the plan could not compare


def build(source: str, out: str | Path, options: Options, workers: int = 1, tell: Tell = lambda line: None) -> Dataset:
    """Plan, run all tasks in `workers` processes and merge: the whole build on one machine.

    Raises:
        InputError: see `data_pipeline.building.plan.plan` and `run`.
    """
    made = plan(source, out, options, workers=workers, tell=tell)
    if isinstance(made, Dataset):
        return made
    for done, number in enumerate(spread(partial(run, out), range(len(made.tasks)), workers), 1):
        tell(f"task {number} done, {done} of {len(made.tasks)}")
    return merge(out)


def run(out: str | Path, number: int, tell: Callable[[int], None] = lambda shard: None) -> int:
    """Do task `number` of the plan in `out`, or what is left of it; returns `number`.

    Args:
        tell: is called with the number of every shard that was written.

    Raises:
        InputError: no such task, another process is at it, a picture changed since the plan or cannot be read.
    """
    root = Path(out).absolute()
    if (root / MANIFEST).exists() and not (root / BUILD).exists():
        return number  # merged already
    made = read_plan(root)
    if not 0 <= number < len(made.tasks):
        raise InputError(f"--task {number}: must be from 0 to {len(made.tasks) - 1}")
    task, path = made.tasks[number], root / BUILD / f"tasks/{number:06d}.parquet"
    with _held(path, number):
        (root / task.split).mkdir(exist_ok=True)
        rows = None
        place, shard = 0, task.first_shard
        while place < task.samples:
            record = _finished(root, task.split, shard)
            if record is None:
                rows = rows if rows is not None else read_table(path)
                record = _write(root, made, task, shard, _dicts(rows.slice(place)), place)
                tell(shard)
            place, shard = record.next, shard + 1
    return number


def merge(out: str | Path) -> Dataset:
    """Make the shards of all tasks a data set: statistics, card, manifest; then delete the plan.

    Raises:
        InputError: a task is not finished; the message says which.
    """
    root = Path(out).absolute()
    if (root / MANIFEST).exists():  # a merge that was killed at the very end, or is called again
        shutil.rmtree(root / BUILD, ignore_errors=True)
        return open_dataset(root)
    made = read_plan(root)
    with claimed(root, clear=False):
        records: dict[str, list[Record]] = {}
        missing = []
        for number, task in enumerate(made.tasks):
            found = _records(root, task)
            if found is None:
                missing.append(number)
            records.setdefault(task.split, []).extend(found or [])
        if missing:
            shown = ", ".join(str(number) for number in missing[:20])
            raise InputError(f"{root}: {len(missing)} of {len(made.tasks)} tasks are not finished: {shown}; run them")
        rows = {
            split: [Row(**record.row) for record in listed if record.row is not None]  # type: ignore[arg-type]
            for split, listed in records.items()
        }
        _refuse_empty(root, rows)
        for path in (*root.iterdir(), *(path for split in rows for path in (root / split).iterdir())):
            if is_aside(path):
                path.unlink()
        counts = [0] * len(made.vocabulary)
        for record in records["train"]:
            for label, count in record.labels.items():
                counts[int(label)] += count
        card = dict(made.origin) | {"statistics": summary(made, records, counts)}
        write_whole(root / CARD, card_page(made, card, rows, counts).encode("utf-8"))
        write_manifest(root, rows, made.label_kind, made.vocabulary, counts, card)
    shutil.rmtree(root / BUILD)
    return open_dataset(root)


def _dicts(rows: pa.Table) -> Iterator[Picked]:
    """The rows of a table, some at a time: a task may have millions."""
    for batch in rows.to_batches(max_chunksize=1000):
        yield from batch.to_pylist()


def _refuse_empty(root: Path, rows: Mapping[str, list[Row]]) -> None:
    """Refuse a split of which nothing could be read."""
    for split, listed in rows.items():
        if not listed:
            raise InputError(f"{root}: no picture of the split {split!r} could be read; take more, or another share")


@contextmanager
def _held(path: Path, number: int) -> Iterator[None]:
    """A task, held by this process alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}; plan again") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"task {number}: another process is doing it; wait for it") from error
    finally:
        os.close(descriptor)


def _record_path(root: Path, split: str, shard: int) -> Path:
    """Where a shard's record is."""
    return root / BUILD / f"records/{split}-{shard:06d}.json"


def _finished(root: Path, split: str, shard: int) -> Record | None:
    """A shard's record, if the shard is there with the sizes that it says."""
    try:
        record = Record(**json.loads(_record_path(root, split, shard).read_bytes()))
        if record.row is None:
            return record
        row = Row(**record.row)  # type: ignore[arg-type]
        sizes = [os.stat(path).st_size for path in (root / row.path, sidecar_path(str(root / row.path)))]
    except (OSError, ValueError, TypeError):
        return None  # not there, or not whole: the shard is written again
    return record if sizes == [row.bytes, sidecar_bytes(row.samples)] else None


def _records(root: Path, task: Task) -> list[Record] | None:
    """All records of a task; None if it is not finished."""
    place, shard, found = 0, task.first_shard, []
    while place < task.samples:
        record = _finished(root, task.split, shard)
        if record is None:
            return None
        found.append(record)
        place, shard = record.next, shard + 1
    return found


def _write(root: Path, made: Plan, task: Task, shard: int, rows: Iterable[Picked], place: int) -> Record:
    """Write one shard from the next pictures of its task, and its record."""
    record = Record(None, place)
    samples = _samples(made, rows, record)
    first = next(samples, None)
    if first is not None:

        def chosen() -> Iterator[Encoded]:
            yield first
            for _ in range(made.shard_samples - 1):
                another = next(samples, None)
                if another is None:
                    return
                yield another

        record.row = asdict(write_shard(root, shard_name(task.split, shard), chosen(), made.label_kind))
    write_whole(_record_path(root, task.split, shard), json.dumps(asdict(record), sort_keys=True).encode())
    return record


def _samples(made: Plan, rows: Iterable[Picked], record: Record) -> Iterator[Encoded]:
    """The samples of some pictures, one after the other; what is seen and left out is noted in `record`."""
    for row in rows:
        record.next += 1
        try:
            data = _read(row)
            pixels_CHW = decode(data, Data().max_pixels)
            extension, side = picture_format(data), min(pixels_CHW.shape[1:])
        except (Damage, Unreachable) as error:
            if not made.skip_unreadable:
                raise InputError(
                    f"{row['place']}: {error}; remove it and plan again, or call `build` or `plan` again with "
                    f"--skip-unreadable, which leaves it out"
                ) from error
            record.skipped.append(f"{row['key']}: {error}")
            continue
        if row["bytes"] == UNKNOWN:
            record.fetched.append(hashlib.sha256(data).hexdigest()[:16])
        if made.short_side and side > made.short_side:
            data, extension, side = _smaller(pixels_CHW, made.short_side, made.quality), "jpg", made.short_side
            record.resized += 1
        labels = row["labels"]
        assert isinstance(labels, list)
        for table, name in (
            *((record.labels, str(label)) for label in labels),
            (record.formats, extension),
            (record.sides, next((f"to {bound}" for bound in SIDES if side <= bound), f"above {SIDES[-1]}")),
        ):
            table[name] = table.get(name, 0) + 1
        yield Encoded(str(row["key"]), extension, data, tuple(labels))


def _read(row: Picked) -> bytes:
    """The bytes of a picture.

    Raises:
        Unreachable: it cannot be fetched.
        InputError: it is not what it was when the build was planned.
    """
    place, size, offset = str(row["place"]), row["bytes"], row["offset"]
    assert isinstance(size, int)
    assert isinstance(offset, int)
    if size == UNKNOWN:
        return download(place)
    try:
        with open(place, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise InputError(f"{place}: cannot be read any more: {error.strerror}; bring it back, or plan again") from error
    if hashlib.sha256(data).digest() != row["content"]:
        raise InputError(f"{place}: changed since the build was planned; delete the unfinished build and plan again")
    return data


def _smaller(pixels_CHW: torch.Tensor, short_side: int, quality: int) -> bytes:
    """A picture, uint8 (3, H, W), at the short side, as JPEG."""
    height, width = pixels_CHW.shape[1:]
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    picture = Image.fromarray(np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy()))
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).save(file, format="JPEG", quality=quality)
    return file.getvalue()
