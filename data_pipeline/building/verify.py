"""`coatnet data verify`: every byte of a data set again and, `--deep`, every picture decoded; findings, not exceptions.

Shards are read one by one in as many processes as asked for; the findings come in the shards' order.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import InputError
from data_pipeline.beton import is_beton
from data_pipeline.building.beton import verify_beton
from data_pipeline.building.findings import WHOLE_SHARD, Finding, Report, decode_whole
from data_pipeline.building.workers import spread
from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import MANIFEST, Dataset, Row, check_files, open_dataset
from data_pipeline.members import Labelling
from data_pipeline.shard import OpenShard, OpenShards
from data_pipeline.store import is_url


@dataclass(frozen=True)
class _Job:
    """One shard to read, as a process needs it."""

    row: Row
    path: str
    classes: int
    single: bool
    deep: bool
    labelling: Labelling


@dataclass(frozen=True)
class _Read:
    """What reading a shard gave."""

    findings: tuple[Finding, ...]
    labels: dict[int, int]  # how many samples carry each
    decoded: int


def verify(path: str | Path, deep: bool = False, workers: int = 1) -> Report:
    """Read every byte again: shard checksums, sidecars, sample checksums, labels and their counts.

    Args:
        path: the data set's folder.
        deep: also decode every picture.
        workers: processes.

    Raises:
        DataError: the manifest itself cannot be opened (see `open_dataset`).
        InputError: a URL, or a number of workers below 1.
    """
    if is_url(str(path)):
        raise InputError(f"{path}: verify reads local folders; a shard behind a URL is verified whenever it is fetched")
    if is_beton(str(path)):
        return verify_beton(str(path), deep, workers)
    dataset = open_dataset(path, look=False)  # a missing shard is a finding, and not the only one
    findings: list[Finding] = []
    extra: list[str] = []
    decoded = 0
    for split in dataset.splits.values():
        jobs = [
            _Job(row, place, dataset.classes, dataset.label_kind == "single", deep, split.labelling)
            for row, place in zip(split.rows, split.shard_paths, strict=True)
        ]
        labels: Counter[int] = Counter()
        found: list[Finding] = []
        for read in spread(_read_shard, jobs, workers):
            found += read.findings
            labels.update(read.labels)
            decoded += read.decoded
        # Samples that could not be read were not counted either.
        if split.name == "train" and not found:
            extra += _count_problems(dataset, labels)
        findings += found
    rows = [row for split in dataset.splits.values() for row in split.rows]
    total = sum(row.samples for row in rows), sum(row.bytes for row in rows)
    per_shard = Counter(finding.shard for finding in findings)
    problems = (*(finding.reason for finding in findings), *extra)
    return Report(dataset.root, len(rows), *total, problems, tuple(findings), tuple(per_shard.items()), decoded)


def verify_command(path: str, deep: bool = False, workers: int = 1, quarantine: str = "") -> str:
    """What `coatnet data verify DIR` prints. With `quarantine` the findings are written to that file, JSONL, as well.

    Raises:
        DataError: something is wrong; the message lists every finding.
    """
    report = verify(path, deep, workers)
    read = f"{report.root}: read {report.samples} samples in {report.shards} shards, {report.bytes / 1e6:.1f} MB"
    read += f", decoded {report.decoded} pictures" if deep else ""
    written = ""
    if quarantine:
        write_quarantine(report, quarantine)
        written = f"\n{len(report.findings)} findings written to {quarantine}"
    if report.problems:
        counts = [f"{shard}: {count}" for shard, count in report.per_shard]
        lines = [f"{read}; {len(report.problems)} problems:", *report.problems]
        raise DataError("\n".join([*lines, "problems per shard:", *counts] if counts else lines) + written)
    return f"{read}; all checksums match{written}"


def write_quarantine(report: Report, path: str | Path) -> None:
    """One JSON object a line for each finding: shard, sample (-1: the whole shard), key, reason.

    Raises:
        InputError: the file cannot be written.
    """
    lines = [json.dumps(vars(finding)) for finding in report.findings]
    temporary = Path(f"{path}.partial")
    try:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="ascii")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"--quarantine {path}: cannot be written: {error.strerror}; choose another file") from error


def _count_problems(dataset: Dataset, labels: Counter[int]) -> list[str]:
    """A line if the manifest counts other labels than the training samples carry."""
    counts = tuple(labels[number] for number in range(dataset.classes))
    if dataset.label_counts in (None, counts):
        return []
    return [f"{Path(dataset.root) / MANIFEST}: label_counts are not those of the samples; build the data set again"]


def _read_shard(job: _Job) -> _Read:
    """Findings in one shard, and what its samples are labelled."""
    findings = []
    labels: Counter[int] = Counter()
    decoded = 0
    try:
        check_files(job.path, job.row)
    except StoreError as error:
        return _Read((Finding(job.row.path, WHOLE_SHARD, "", str(error)),), {}, 0)
    shards = OpenShards([job.path], np.array([job.row.samples], dtype=np.int64), limit=1)
    try:
        with open(job.path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != job.row.sha256:
                reason = f"{job.path}: the bytes do not match the manifest's sha256; fetch it again"
                findings.append(Finding(job.row.path, WHOLE_SHARD, "", reason))
        for found in _read_samples(job, shards.get(0)):
            if isinstance(found, Finding):
                findings.append(found)
            else:
                labels.update(found)
                decoded += job.deep
    except (DataError, OSError) as error:
        findings.append(Finding(job.row.path, WHOLE_SHARD, "", str(error)))
    finally:
        shards.close()
    return _Read(tuple(findings), dict(labels), decoded)


def _read_samples(job: _Job, opened: OpenShard) -> Iterator[Finding | set[int]]:
    """The labels of each sample of a shard, or what is wrong with it."""
    for number in range(job.row.samples):
        key = ""
        try:
            sample = opened.read(number, job.classes, job.labelling)
            key = sample.key
            where = f"{job.path}: sample {number} at byte {int(opened.sidecar.offsets[number])}, key {key!r}"
            if job.single and len(sample.labels) != 1:
                raise DataError(f"{where}: {len(sample.labels)} labels in a data set of single labels")
            if job.deep:
                decode_whole(sample.picture, where)
            yield set(sample.labels)
        except DataError as error:
            yield Finding(job.row.path, number, key, str(error))
