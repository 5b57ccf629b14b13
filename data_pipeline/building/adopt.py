"""`coatnet data adopt`: existing WebDataset tars become a data set as they are, in place.

The data set's folder holds a link to each tar and, beside the link, the sidecar; the tars are only read. So a manifest
still names nothing outside its folder, and whoever fetches one from elsewhere is led nowhere; links are what the user
of this machine made. A copy of the folder must follow them (`cp -rL`). Every sample is read back as training will read
it. Tars of another form, or with damaged samples, are for `coatnet data build`, which writes new ones.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from configs.errors import InputError
from data_pipeline.building.build import BUILD, already_built, claimed, shard_name, write_manifest
from data_pipeline.building.labels import read_vocabulary, understand
from data_pipeline.building.plan import SHOWN, Tell
from data_pipeline.building.tars import TarSample, tar_samples
from data_pipeline.building.workers import spread
from data_pipeline.building.writing import write_whole
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, LabelKind, Row, open_dataset
from data_pipeline.members import PLAIN, Labelling, Sample, parse
from data_pipeline.shard import pack_sidecar, sidecar_path

ANY_CLASS = 1_000_000  # labels are held against this before the number of classes is known


@dataclass(frozen=True)
class _Job:
    """A tar to index as a shard of a split."""

    tar: str
    split: str
    number: int
    label_field: str = ""


@dataclass(frozen=True)
class _Indexed:
    """What a tar holds: its row, how many samples carry each label, whether all have just one, what is wrong."""

    row: dict[str, object]
    labels: dict[str, int]
    single: bool
    problems: list[str]


def adopt(
    tars: Sequence[str],
    out: str | Path,
    heldout: Sequence[str] = (),
    vocabulary: str = "",
    workers: int = 1,
    tell: Tell = lambda line: None,
    label_field: str = "",
) -> Dataset:
    """Index tars as the training split, and those of `heldout` as the held-out one, in folder `out`.

    A killed call continues behind the tars it had finished.

    Args:
        tars: paths.
        out: the data set's folder to be.
        heldout: paths.
        vocabulary: file of class names; empty: the classes are named by their numbers, up to the largest label, or by
            the names that stand in the label field.
        workers: processes.
        tell: is given lines on the progress.
        label_field: of the json members, which holds a name or an index or a list of them; empty: `cls` or `labels`.

    Raises:
        InputError: a path twice or no tar, samples that training could not read, or `out` holds something else.
    """
    root = Path(out).absolute()
    listed = {
        split: [str(Path(tar).absolute()) for tar in given] for split, given in (("train", tars), ("heldout", heldout))
    }
    _check([path for paths in listed.values() for path in paths], tars)
    names = read_vocabulary(vocabulary)
    origin: dict[str, object] = {
        "source": f"{len(tars) + len(heldout)} tars, adopted",
        "creation": "links to existing tars",
        "listing": _listing(listed),
        **({"label_field": label_field} if label_field else {}),
        "vocabulary_given": hashlib.sha256(json.dumps(names).encode()).hexdigest() if names else "",
    }
    built = already_built(root, origin)
    if built:
        return built
    folder = root / BUILD
    marker = folder / "origin.json"
    fresh = not marker.exists() or json.loads(marker.read_bytes()) != origin
    with claimed(root, clear=fresh):
        for path in (folder / "records", *(root / split for split, paths in listed.items() if paths)):
            path.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps(origin).encode())
        jobs = [
            _Job(tar, split, number, label_field) for split, paths in listed.items() for number, tar in enumerate(paths)
        ]
        found = []
        for number, indexed in enumerate(spread(partial(_index, root), jobs, workers), 1):
            found.append(indexed)
            tell(f"read tar {number} of {len(jobs)}")
        _refuse([line for indexed in found for line in indexed.problems])
        _finish(root, jobs, found, names, origin, label_field)
    shutil.rmtree(folder)
    return open_dataset(root)


def _check(paths: Sequence[str], training: Sequence[str]) -> None:
    """Refuse an empty list, a path given twice, and files that are no tars."""
    if not training:
        raise InputError("coatnet data adopt: no tars given")
    for path, count in Counter(paths).items():
        if count > 1:
            raise InputError(f"{path}: is given {count} times; a tar belongs to one split, once")
        if not path.endswith(".tar") or not os.path.isfile(path):
            raise InputError(f"{path}: no such file, or no uncompressed .tar; unpack compressed ones first")


def _refuse(problems: Sequence[str]) -> None:
    """Refuse tars with samples that training could not read."""
    if problems:
        raise InputError(
            f"{len(problems)} samples cannot be read from these tars as they are: {'; '.join(problems[:SHOWN])}; "
            f"--label-field NAME reads labels in another field of the json members; `coatnet data build` writes new "
            f"shards from tars of any labels, and leaves out what is damaged with --skip-unreadable"
        )


def _listing(listed: Mapping[str, Sequence[str]]) -> str:
    """sha256 over paths, sizes and times."""
    digest = hashlib.sha256()
    for split, paths in listed.items():
        for path in paths:
            status = os.stat(path)
            digest.update(f"{split}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _index(root: Path, job: _Job) -> _Indexed:
    """Index a tar, unless that was done before: link, sidecar, and the record last."""
    record = root / BUILD / f"records/{job.split}-{job.number:06d}.json"
    try:
        return _Indexed(**json.loads(record.read_bytes()))
    except FileNotFoundError:
        indexed, sidecar = _read(job)
    if not indexed.problems:
        link = root / shard_name(job.split, job.number)
        link.unlink(missing_ok=True)
        link.symlink_to(job.tar)
        write_whole(Path(sidecar_path(str(link))), sidecar)
        write_whole(record, json.dumps(asdict(indexed)).encode())
    return indexed


def _read(job: _Job) -> tuple[_Indexed, bytes]:
    """What a tar holds, and its sidecar. Every sample is read as training reads it."""
    labels: Counter[str] = Counter()
    words: defaultdict[str, int] = defaultdict()  # numbered as they come: which class they are shows at the end
    words.default_factory = words.__len__
    labelling = Labelling(job.label_field, words) if job.label_field else PLAIN
    single, problems = True, []
    offsets: list[int] = []
    crcs: list[int] = []
    digest = hashlib.sha256()
    with open(job.tar, "rb") as file:
        samples = list(tar_samples(job.tar))
        digest.update(file.read(samples[0].begin if samples else 0))
        for sample in samples:
            data = file.read(sample.end - sample.begin)
            digest.update(data)
            offsets.append(sample.begin)
            crcs.append(zlib.crc32(data))
            try:
                found = _sample(sample, data, labelling)
                names = list(words)
                labels.update(names[label] if names else str(label) for label in set(found.labels))
                single = single and len(found.labels) == 1 and not found.weights
            except DataError as error:
                problems.append(f"{job.tar}: {error}")
        digest.update(file.read())
        size = file.tell()
    if not samples:
        problems.append(f"{job.tar}: holds no samples")
        return _Indexed({}, {}, single, problems), b""
    row = Row(shard_name(job.split, job.number), len(samples), size, digest.hexdigest())
    return _Indexed(asdict(row), dict(labels), single, problems), pack_sidecar([*offsets, samples[-1].end], crcs)


def _sample(sample: TarSample, data: bytes, labelling: Labelling) -> Sample:
    """A sample as training reads it.

    Raises:
        DataError: training could not read it.
    """
    if sample.problem:
        raise DataError(f"key {sample.key!r}: {sample.problem}")
    return parse(data, ANY_CLASS, labelling)


def _finish(
    root: Path,
    jobs: Sequence[_Job],
    found: Sequence[_Indexed],
    names: Sequence[str],
    origin: Mapping[str, object],
    label_field: str,
) -> None:
    """Write the manifest over all tars.

    Raises:
        InputError: a label that the vocabulary has no name for.
    """
    words = {word for indexed in found for word in indexed.labels}
    if not words:
        raise InputError(f"{root}: no sample has a label")
    largest = -1 if label_field else max(map(int, words))
    if names and largest >= len(names):
        raise InputError(f"--vocabulary: names {len(names)} classes, but the tars have label {largest}")
    if label_field:
        understood = understand(words, names, {})
        vocabulary, index = list(understood.vocabulary), {word: understood.of([word])[0] for word in words}
    else:
        vocabulary = list(names) or [str(number) for number in range(largest + 1)]
        index = {word: int(word) for word in words}
    counts = [0] * len(vocabulary)
    rows: dict[str, list[Row]] = {}
    for job, indexed in zip(jobs, found, strict=True):
        if job.split == "train":
            for word, count in indexed.labels.items():
                counts[index[word]] += count
        rows.setdefault(job.split, []).append(Row(**indexed.row))  # type: ignore[arg-type]
    kind: LabelKind = "single" if all(indexed.single for indexed in found) else "multi"
    write_manifest(root, rows, kind, vocabulary, counts, origin, label_field)
