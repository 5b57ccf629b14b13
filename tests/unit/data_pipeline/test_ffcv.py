"""FFCV's .beton files as far as it goes without FFCV: refusals, the place of a sample, the first batch in time."""

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import InputError
from configs.schema import Data, Run
from data_pipeline.batch import Batch
from data_pipeline.beton import Notes, checksum, read_notes
from data_pipeline.building.verify import verify
from data_pipeline.errors import Damage, DataError
from data_pipeline.ffcv import in_time, split_of
from data_pipeline.manifest import Dataset
from data_pipeline.order import Order
from data_pipeline.stream import open_data
from trainer.commands.ffcv import ffcv_command

RunOf = Callable[..., Run]


def notes_of(dataset: Dataset, size: int) -> Notes:
    part = dataset.split("train")
    shards = tuple((row.path, row.samples) for row in part.rows)
    names, counts = dataset.vocabulary, dataset.label_counts
    return Notes(
        "train", part.samples, shards, "single", names, counts, part.fingerprint, {}, 0, 90, "1.0.2", size, "0" * 64
    )


def headed(folder: Path, dataset: Dataset) -> Path:
    """A file with the right header and size, and nothing else of a .beton; and its notes."""
    path, samples = folder / "head.beton", dataset.split("train").samples
    data = struct.pack("<HHIQQ", 2, 4, 1 << 23, samples, 5000) + bytes(5000 - 24 + 48 * samples)
    path.write_bytes(data)
    Path(f"{path}.json").write_text(notes_of(dataset, len(data)).to_json())
    return path


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)


@pytest.mark.usefixtures("without_ffcv")
def test_without_ffcv_all_that_is_missing_is_named(tmp_path: Path, dataset: Dataset, run_of: RunOf) -> None:
    path = headed(tmp_path, dataset)
    calls: list[Callable[[], object]] = [
        lambda: open_data(run_of(path=path)),
        lambda: verify(path),
        lambda: ffcv_command([dataset.root, "--out", str(tmp_path / "new.beton")]),
    ]
    for call in calls:
        with pytest.raises(InputError) as refusal:
            call()
        for word in ("libturbojpeg0-dev", "libopencv-dev", "pkg-config", "g++", "pip install -e '.[ffcv]'", "tars"):
            assert word in str(refusal.value)
    assert not list(tmp_path.glob("new*"))


def test_sample_i_is_sample_i_of_the_split(tmp_path: Path, dataset: Dataset) -> None:
    path = headed(tmp_path, dataset)
    part, here = dataset.split("train"), split_of(str(path), read_notes(str(path)))
    order, ours = (Order(found.counts, 3, 12, 5, 4) for found in (part, here))
    positions = np.arange(3 * part.samples)
    starts = np.cumsum(part.counts) - part.counts
    for found, expected in zip(ours.lookup(positions), order.lookup(positions), strict=True):
        assert (found == expected).all()
    _, shard, number = ours.lookup(positions[: part.samples])
    assert sorted(starts[shard] + number) == list(range(part.samples))
    assert here.fingerprint != part.fingerprint  # other pictures: a run over the tars is not silently continued


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("samples", -1, "whole numbers"),
        ("samples", 7, "do not hold 7"),
        ("bytes", True, "whole numbers"),
        ("sha256", "abc", "64 hex digits"),
        ("split", 3, "words"),
        ("card", [], "card a table"),
        ("label_kind", "soft", "label_kind"),
        ("vocabulary", ["a", "a"], "twice"),
        ("vocabulary", [], "list of names"),
        ("label_counts", [1], "label_counts"),
        ("shards", [["a.tar"]], "shards"),
        ("shards", [["a.tar", 0]], "shards"),
        ("shards", [], "do not hold"),
        ("version", 2, "version 1"),
        ("more", 1, "too much"),
        ("bytes", 5, "says 5"),
    ],
)
def test_damaged_notes_are_refused(tmp_path: Path, dataset: Dataset, name: str, value: object, message: str) -> None:
    path = headed(tmp_path, dataset)
    content = json.loads(Path(f"{path}.json").read_text())
    read_notes(str(path))
    Path(f"{path}.json").write_text(json.dumps(content | {name: value}))
    with pytest.raises(DataError, match=message):
        read_notes(str(path))


@pytest.mark.parametrize("place", [0, 2, 4, 8, 16])
def test_a_damaged_header_is_refused(tmp_path: Path, dataset: Dataset, place: int) -> None:
    path = headed(tmp_path, dataset)
    data = bytearray(path.read_bytes())
    data[place] ^= 5
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"head\.beton: (version|its header)"):
        read_notes(str(path))


def test_missing_files_are_refused(tmp_path: Path, dataset: Dataset) -> None:
    path = headed(tmp_path, dataset)
    path.rename(tmp_path / "other.beton")
    with pytest.raises(DataError, match=r"head\.beton: missing"):
        read_notes(str(path))
    with pytest.raises(DataError, match=r"other\.beton\.json: cannot be read.*coatnet data ffcv DIR"):
        read_notes(str(tmp_path / "other.beton"))


def test_what_a_beton_cannot_do_is_refused(run_of: RunOf) -> None:
    run = run_of(path="x.beton")
    with pytest.raises(InputError, match=r"data\.cache"):
        open_data(replace(run, data=replace(run.data, cache="/tmp/cache")))
    with pytest.raises(InputError, match="cannot be mixed"):
        open_data(replace(run, data=Data(mixture=("x.beton:1", "y:2"))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["set"], "needs the data set's folder"),
        (["--out", "x.beton"], "needs the data set's folder"),
        (["set", "--out", "x.ffcv"], r"must be FILE\.beton"),
        (["set", "--out", "none/x.beton"], "a folder that exists"),
        (["set", "--out", "x.beton", "--jpeg-quality", "0"], "from 1 to 100"),
        (["set", "--out", "x.beton", "--max-resolution", "-1"], "whole number"),
        (["set", "--out", "x.beton", "--split"], "needs a value"),
        (["s3://bucket/set", "--out", "x.beton"], "local folder"),
        (["set", "--out", "x.beton", "--workrs", "2"], "did you mean '--workers'"),
    ],
)
def test_words_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ffcv_command(words)


def batch_of(number: int) -> Batch:
    one = torch.tensor([number])
    return Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), one, one, one, one > -1, [str(number)])


def slowly(seconds: float) -> Iterator[Batch]:
    yield batch_of(0)
    time.sleep(seconds)
    yield batch_of(1)


def test_a_first_batch_that_never_comes_is_an_error() -> None:
    def never() -> Iterator[Batch]:
        time.sleep(2)
        yield batch_of(0)

    began = time.perf_counter()
    with pytest.raises(DataError, match=r"x\.beton: no batch within 0\.2 s.*folder of the tars"):
        next(in_time(never(), "x.beton", 0.2))
    assert time.perf_counter() - began < 1.5


def test_in_time_every_batch_and_every_error_comes_through() -> None:
    found = [batch.keys for batch in in_time(slowly(0.3), "x.beton", 0.2)]  # only the first has a limit
    assert found == [["0"], ["1"]]
    assert not list(in_time(iter(()), "x.beton"))

    def bad(damaged: bool) -> Iterator[Batch]:
        if damaged:
            raise Damage("broken", "k")
        yield batch_of(0)

    assert len(list(in_time(bad(False), "x.beton"))) == 1
    with pytest.raises(Damage, match="broken"):
        list(in_time(bad(True), "x.beton"))


def test_the_checksum_covers_number_picture_and_labels() -> None:
    found = {checksum(*case) for case in ((0, b"p", b"n"), (1, b"p", b"n"), (0, b"q", b"n"), (0, b"p", b"m"))}
    assert len(found) == 4
