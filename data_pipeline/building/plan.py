"""The plan of a build: what each task writes, settled before any task begins.

    DIR/.coatnet-build/origin.json       what the plan is made from
                       parts/*.parquet   the examined source (`examine`), staged/*.bin its copied pictures
                       tasks/*.parquet   the pictures of each task, in the order of the shards
                       plan.json         the rest, written last: a plan without it is none

Every picture is read once here, for its hash and header: exact copies become one picture before the split, and the
order over all shards, that of the keys' hashes, is fixed. A task is a range of that order with its own shard numbers.
The table of all pictures is sorted in memory, about 1 kB a picture; beyond that, build several sets and mix them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import InputError
from data_pipeline.building.arrange import Arranged, arrange
from data_pipeline.building.build import BUILD, HELDOUT_SHARE, SPLITS, already_built, claimed
from data_pipeline.building.examine import Job, class_names, examine
from data_pipeline.building.labels import read_hierarchy, read_vocabulary
from data_pipeline.building.sources import Reading, Source, list_source
from data_pipeline.building.workers import spread
from data_pipeline.building.writing import aside, flush_folder, write_whole
from data_pipeline.manifest import Dataset, LabelKind

PLAN, ORIGIN = "plan.json", "origin.json"
FORMAT, VERSION = "coatnet-build", 1
SHARD = 1000  # samples
TASK_SHARDS = 4  # shards of a task where the user does not say how many tasks there are to be
QUALITY = 90
MIN_SHORT_SIDE = 16
SHOWN = 5  # unreadable pictures that an error names

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a build makes of its source.

    Args:
        reading: how the source is read.
        shard_samples: samples of a shard.
        heldout: share of the pictures, by hash of the content, for the held-out split; -1: 0.15, or 0 with
            `heldout_source`.
        heldout_source: another source whose pictures all are held out, read in the same way.
        label_kind: auto, single or multi.
        vocabulary: file of class names; empty: from the source.
        hierarchy: file of child, tab, parent; a picture gets the ancestors of its labels too.
        short_side: pixels; pictures with a larger one are stored at it, as JPEG; 0 keeps all bytes as they are.
        quality: of these JPEGs; 0: QUALITY.
        skip_unreadable: leave out and count what cannot be read, in place of refusing.
    """

    reading: Reading = field(default_factory=Reading)
    shard_samples: int = SHARD
    heldout: float = -1.0
    heldout_source: str = ""
    label_kind: str = "auto"
    vocabulary: str = ""
    hierarchy: str = ""
    short_side: int = 0
    quality: int = 0
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Task:
    """A task: `samples` pictures of one split for `shards` shards from number `first_shard` on."""

    split: str
    first_shard: int
    shards: int
    samples: int


@dataclass(frozen=True)
class Plan:
    """A whole plan, as plan.json holds it. `counts` says what was left out."""

    origin: Mapping[str, object]
    label_kind: LabelKind
    vocabulary: tuple[str, ...]
    shard_samples: int
    short_side: int
    quality: int
    skip_unreadable: bool
    counts: Mapping[str, int]
    tasks: tuple[Task, ...]


def plan(
    source: str, out: str | Path, options: Options, tasks: int = 0, workers: int = 1, tell: Tell = lambda line: None
) -> Plan | Dataset:
    """Write the plan of a build into folder `out`, or find it there; the data set itself if it is built already.

    Args:
        source: see `data_pipeline.building.sources.list_source`.
        out: the data set's folder to be.
        options: what to make.
        tasks: at most how many tasks, but one for each split; 0: one for every TASK_SHARDS shards.
        workers: processes that read the source.
        tell: is given lines on the progress.

    Raises:
        InputError: the source or an option is of no use, pictures cannot be read, or `out` holds something else.
    """
    _check(options, tasks)
    root = Path(out).absolute()  # the tasks may run elsewhere
    main = list_source(source, options.reading)
    sources = [(main, False)]
    if options.heldout_source:
        sources.append((list_source(options.heldout_source, options.reading), True))
    origin = _origin([listed for listed, _ in sources], options)
    built = already_built(root, origin)
    if built:
        shutil.rmtree(root / BUILD, ignore_errors=True)  # of a merge that was killed at the very end
        return built
    folder = root / BUILD
    if (folder / PLAN).exists():
        return _continued(root, origin, options, tasks)
    fresh = not (folder / ORIGIN).exists() or json.loads((folder / ORIGIN).read_bytes()) != origin
    with claimed(root, clear=fresh):
        for name in ("parts", "staged", "tasks", "records"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_whole(folder / ORIGIN, json.dumps(origin, indent=1).encode())
        parts = [(part, heldout) for listed, heldout in sources for part in listed.parts]
        jobs = [Job(part, held, str(folder / f"staged/{n:06d}.bin")) for n, (part, held) in enumerate(parts)]
        for done, _ in enumerate(spread(partial(_examine, folder), list(enumerate(jobs)), workers), 1):
            tell(f"examined part {done} of {len(jobs)}")
        given = read_vocabulary(options.vocabulary) or class_names(main)
        share = options.heldout if options.heldout >= 0 else 0.0 if options.heldout_source else HELDOUT_SHARE
        parents = read_hierarchy(options.hierarchy)
        arranged = arrange(_tables(folder, len(jobs)), options.label_kind, given, parents, share)
        _refuse_unreadable(arranged, options.skip_unreadable)
        _check_splits(arranged, root, share)
        made = _cut(arranged, options, origin, tasks)
        for number, rows in enumerate(_task_tables(arranged, made)):
            _write_table(folder / f"tasks/{number:06d}.parquet", rows)
        write_whole(folder / PLAN, json.dumps({"format": FORMAT, "version": VERSION, **asdict(made)}).encode())
    return made


def read_plan(root: Path) -> Plan:
    """The plan in a data set's folder.

    Raises:
        InputError: there is none, or it is of another version.
    """
    path = root / BUILD / PLAN
    try:
        content = json.loads(path.read_bytes())
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError("it is of another version")
        tasks = tuple(Task(**task) for task in content.pop("tasks"))
        return Plan(tasks=tasks, vocabulary=tuple(content.pop("vocabulary")), **content)
    except FileNotFoundError as error:
        raise InputError(f"{root}: holds no plan; make one with `coatnet data plan SOURCE --out {root}`") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete {root / BUILD} and plan again") from error


def _check(options: Options, tasks: int) -> None:
    """Refuse numbers out of range."""
    if options.shard_samples < 1:
        raise InputError(f"--shard-samples {options.shard_samples}: must be at least 1")
    if options.heldout != -1 and not 0 <= options.heldout < 1:
        raise InputError(f"--heldout {options.heldout}: must be a share from 0 to below 1, such as 0.05")
    if options.short_side and options.short_side < MIN_SHORT_SIDE:
        raise InputError(f"--short-side {options.short_side}: must be 0 or at least {MIN_SHORT_SIDE}")
    if options.quality and (not options.short_side or not 1 <= options.quality <= 100):
        raise InputError(f"--quality {options.quality}: must be from 1 to 100, and is for --short-side only")
    if tasks < 0:
        raise InputError(f"--tasks {tasks}: must be at least 1")


def _origin(sources: Sequence[Source], options: Options) -> dict[str, object]:
    """What settles the data set to the byte, as entries of its card, but for pictures that turn out unreadable."""
    main = sources[0]
    origin: dict[str, object] = {
        "source": f"{main.kind} {main.name}",
        "creation": f"{options.shard_samples} samples a shard, exact copies removed, shuffled by hash of the key",
        "listing": [source.digest for source in sources],
        "vocabulary_given": _digest(read_vocabulary(options.vocabulary)),
        "hierarchy": _digest(read_hierarchy(options.hierarchy)),
    }
    for name in ("heldout", "label_kind", "short_side", "shard_samples"):
        origin[name] = getattr(options, name)
    origin["quality"] = (options.quality or QUALITY) if options.short_side else 0
    reading = options.reading
    origin["reading"] = [reading.labels, dict(reading.columns or {}), reading.label_field]
    return origin


def _digest(value: object) -> str:
    """sha256 of a JSON value; empty for an empty one."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest() if value else ""


def _continued(root: Path, origin: Mapping[str, object], options: Options, tasks: int) -> Plan:
    """The plan that `root` already has, if it is the one asked for."""
    found = read_plan(root)
    if found.origin != origin:
        names = [name for name in origin if found.origin.get(name) != origin[name]]
        raise InputError(
            f"{root}: holds an unfinished build from other input or options ({', '.join(names)} differ); finish it "
            f"with its own words, delete the folder, or choose another"
        )
    if tasks and tasks != len(found.tasks):
        raise InputError(f"{root}: is planned in {len(found.tasks)} tasks already; run these, or delete the folder")
    if found.skip_unreadable and not options.skip_unreadable:
        raise InputError(f"{root}: is planned with --skip-unreadable; say it again, or delete the folder")
    if options.skip_unreadable and not found.skip_unreadable:  # no task has left out anything so far
        found = replace(found, skip_unreadable=True)
        write_whole(root / BUILD / PLAN, json.dumps({"format": FORMAT, "version": VERSION, **asdict(found)}).encode())
    return found


def _examine(folder: Path, numbered: tuple[int, Job]) -> None:
    """Examine a part, unless that was done before."""
    number, job = numbered
    path = folder / f"parts/{number:06d}.parquet"
    if not path.exists():
        _write_table(path, examine(job))


def _tables(folder: Path, parts: int) -> pa.Table:
    """The examined source as one table."""
    paths = [folder / f"parts/{number:06d}.parquet" for number in range(parts)]
    return pa.concat_tables([read_table(path) for path in paths])


def read_table(path: Path) -> pa.Table:
    """A Parquet file, read in this thread: threads that Arrow leaves behind can abort the process when it ends."""
    return pq.ParquetFile(path, pre_buffer=False).read(use_threads=False)


def _write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file aside and rename it."""
    temporary = aside(path)
    with suppress(FileNotFoundError):
        temporary.unlink()
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)
    flush_folder(path.parent)


def _refuse_unreadable(arranged: Arranged, skip: bool) -> None:
    """Refuse a source with pictures that cannot be used, unless they are to be left out."""
    if arranged.problems and not skip:
        raise InputError(
            f"{arranged.counts['unreadable']} of {arranged.counts['listed']} pictures cannot be used: "
            f"{'; '.join(arranged.problems[:SHOWN])}; remove them, or leave them out with --skip-unreadable"
        )


def _check_splits(arranged: Arranged, root: Path, share: float) -> None:
    """Refuse a data set without training pictures, or without the held-out ones asked for."""
    samples = {split: len(arranged.rows[split]) for split in SPLITS}
    if not samples["train"] or (share and not samples["heldout"]):
        raise InputError(
            f"{root}: of {arranged.counts['listed']} pictures {samples['train']} are for training and "
            f"{samples['heldout']} held out; take more, or another --heldout"
        )


def _cut(arranged: Arranged, options: Options, origin: Mapping[str, object], tasks: int) -> Plan:
    """The plan: each split's order cut into tasks at multiples of the shard size."""
    samples = {split: len(arranged.rows[split]) for split in SPLITS if len(arranged.rows[split])}
    size = options.shard_samples
    shards = {split: -(-count // size) for split, count in samples.items()}
    each = TASK_SHARDS if not tasks else 1
    while tasks and sum(-(-count // each) for count in shards.values()) > max(tasks, len(shards)):
        each += 1
    made = []
    for split, count in shards.items():
        for first in range(0, count, each):
            number = min(each, count - first)
            made.append(Task(split, first, number, min(number * size, samples[split] - first * size)))
    quality = (options.quality or QUALITY) if options.short_side else 0
    return Plan(
        origin,
        arranged.kind,
        arranged.labels.vocabulary,
        size,
        options.short_side,
        quality,
        options.skip_unreadable,
        arranged.counts,
        tuple(made),
    )


def _task_tables(arranged: Arranged, made: Plan) -> Iterator[pa.Table]:
    """The pictures of each task."""
    for task in made.tasks:
        first = task.first_shard * made.shard_samples
        yield arranged.table(arranged.rows[task.split][first : first + task.samples])
