"""Opening and verifying: whatever is missing, damaged or foreign is a DataError that says so; nothing wrong is read."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from data_pipeline.building.verify import verify, verify_command
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, Row, fingerprint, open_dataset, pack_rows
from data_pipeline.shard import OpenShards, Sample, pack_sidecar, parse, read_sidecar

Content = dict[str, object]


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.root, tmp_path / "copy"))


def everything(root: str | Path) -> list[Sample]:
    """Every sample of every split, in order."""
    dataset, samples = open_dataset(root), []
    for split in dataset.splits.values():
        shards = OpenShards(split.shard_paths, split.counts, limit=2)
        for shard, count in enumerate(split.counts.tolist()):
            samples += [shards.get(shard).read(number, dataset.classes) for number in range(count)]
        shards.close()
    return samples


def change_manifest(root: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads((root / "manifest.json").read_text())
    change(content)
    (root / "manifest.json").write_text(json.dumps(content))


def change_rows(root: Path, rows: list[Row]) -> None:
    """Rewrite the index of the training split with all its checksums consistent."""
    data = pack_rows(rows)
    (root / "train.parquet").write_bytes(data)

    def update(content: dict[str, object]) -> None:
        splits = content["splits"]
        assert isinstance(splits, dict)
        splits["train"] |= {
            "samples": sum(row.samples for row in rows),
            "shards": len(rows),
            "sha256": hashlib.sha256(data).hexdigest(),
            "fingerprint": fingerprint("single", ["a", "b", "c"], rows),
        }

    change_manifest(root, update)


def test_an_open_data_set_states_its_facts(dataset: Dataset) -> None:
    train, heldout = dataset.split("train"), dataset.split("heldout")
    assert (dataset.classes, dataset.label_kind, dataset.vocabulary) == (3, "single", ("a", "b", "c"))
    assert train.samples + heldout.samples == 70
    assert set(train.counts[:-1].tolist()) == {6}
    assert train.counts.sum() == train.samples
    assert train.fingerprint != heldout.fingerprint
    with pytest.raises(InputError, match="did you mean 'train'"):
        dataset.split("trian")


def test_plain_webdataset_reads_the_shards(dataset: Dataset) -> None:
    paths = list(dataset.split("train").shard_paths)
    read = list(webdataset.WebDataset(paths, shardshuffle=False))
    ours = everything(dataset.root)[: len(read)]
    assert [sample["__key__"] for sample in read] == [sample.key for sample in ours]
    assert [int(sample["cls"]) for sample in read] == [sample.labels[0] for sample in ours]
    assert [sample.get("png", sample.get("jpg")) for sample in read] == [sample.picture for sample in ours]


def test_a_missing_folder_or_manifest_says_what_to_do(tmp_path: Path) -> None:
    for path in ("", str(tmp_path / "none"), "a\0b", tmp_path):
        with pytest.raises(DataError) as refusal:
            open_dataset(path)
        for words in ("data build SOURCE --out DIR", "data adopt TAR ... --out DIR", "data demo --out DIR"):
            assert words in str(refusal.value)
    assert "manifest.json: no manifest" in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="other"), "not a manifest of this trainer"),
        (lambda c: c.update(version=2), "version 2, this trainer reads 1"),
        (lambda c: c.update(version=True), "version True"),
        (lambda c: c.update(vocabulary=[1, 2, 3]), "vocabulary"),
        (lambda c: c.update(vocabulary=["a", "a", "b"]), "names a class twice"),
        (lambda c: c.update(vocabulary=["a", "c", "b"]), "fingerprint"),
        (lambda c: c.update(label_kind="many"), "label_kind = 'many'"),
        (lambda c: c.update(splits={}), "splits"),
        (lambda c: c["splits"]["train"].update(samples=-1), "samples"),
        (lambda c: c["splits"]["train"].update(extra=1), "nothing else"),
        (lambda c: c["splits"]["train"].update(index="../train.parquet"), "inside"),
        (lambda c: c["splits"]["train"].update(index=5), "inside"),
        (lambda c: c["splits"]["train"].update(index="\ud800.parquet"), "cannot be read"),
        (lambda c: c["splits"]["train"].update(index="none.parquet"), "cannot be read"),
        (lambda c: c["splits"]["train"].update(sha256="0" * 64), "checksum"),
    ],
)
def test_a_foreign_manifest_is_refused(copy: Path, change: Callable[[dict[str, object]], object], said: str) -> None:
    change_manifest(copy, change)
    with pytest.raises(DataError) as refusal:
        open_dataset(copy)
    assert said in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_dataset(copy)


@pytest.mark.parametrize(
    "path", ["/etc/shard.tar", "../outside.tar", "train/../../outside.tar", "a\0.tar", "train/x.zip"]
)
def test_a_shard_outside_the_folder_is_refused(copy: Path, path: str) -> None:
    rows = list(open_dataset(copy).split("train").rows)
    change_rows(copy, [Row(path, rows[0].samples, rows[0].bytes, rows[0].sha256), *rows[1:]])
    with pytest.raises(DataError, match=r"must be a relative path to a \.tar file inside"):
        open_dataset(copy)


@pytest.mark.parametrize(("samples", "size"), [(-6, 1), (0, 1), (6, -1), (6, 2**60)])
def test_numbers_out_of_range_are_refused(copy: Path, samples: int, size: int) -> None:
    rows = list(open_dataset(copy).split("train").rows)
    change_rows(copy, [Row(rows[0].path, samples, size, rows[0].sha256), *rows[1:]])
    with pytest.raises(DataError, match="must be positive"):
        open_dataset(copy)


def test_an_empty_split_is_refused(copy: Path) -> None:
    change_rows(copy, [])
    with pytest.raises(DataError, match=r"split 'train' is empty, .* build the data set again with more pictures"):
        open_dataset(copy)


def test_a_shard_listed_twice_is_refused(copy: Path) -> None:
    rows = list(open_dataset(copy).split("train").rows)
    change_rows(copy, [rows[0], rows[0]])
    with pytest.raises(DataError, match="twice"):
        open_dataset(copy)


@pytest.mark.parametrize("columns", [{"path": ["a.tar"]}, {"path": [1], "samples": [1], "bytes": [1], "sha256": ["x"]}])
def test_other_columns_are_refused(copy: Path, columns: dict[str, list[object]]) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    (copy / "train.parquet").write_bytes(file.getvalue())
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    change_manifest(copy, lambda content: content["splits"]["train"].update(sha256=digest))  # type: ignore[index]
    with pytest.raises(DataError, match="columns must be"):
        open_dataset(copy)


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_missing_and_truncated_shards_are_found_at_once(copy: Path, suffix: str) -> None:
    file = copy / "train" / f"shard-000002{suffix}"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(DataError, match=rf"shard-000002\{suffix}: \d+ bytes, the manifest says"):
        open_dataset(copy)
    file.unlink()
    with pytest.raises(DataError, match=rf"shard-000002\{suffix}: missing"):
        open_dataset(copy)


def test_flipped_picture_bytes_are_named(copy: Path) -> None:
    path = copy / "train" / "shard-000001.tar"
    begin = int(read_sidecar(str(path), 6).offsets[3])
    data = bytearray(path.read_bytes())
    data[begin + 600] ^= 1
    path.write_bytes(data)
    key = data[begin : begin + 100].partition(b"\0")[0].decode()
    with pytest.raises(DataError) as refusal:
        everything(copy)
    for part in ("shard-000001.tar", "sample 3", f"byte {begin}", key, "do not match their checksum"):
        assert part in str(refusal.value)
    report = verify(copy)
    assert len(report.problems) == 2  # the shard's sha256, the sample's crc32
    with pytest.raises(DataError, match="2 problems"):
        verify_command(str(copy))


def test_a_whole_data_set_verifies(dataset: Dataset) -> None:
    report = verify(dataset.root)
    assert (report.samples, report.problems) == (70, ())
    assert "all checksums match" in verify_command(dataset.root)


@given(file=st.integers(0, 99), place=st.integers(0, 10**6), change=st.integers(0, 255))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_found_or_harmless(dataset: Dataset, file: int, place: int, change: int) -> None:
    truth = everything(dataset.root)
    files = sorted(path for path in Path(dataset.root).rglob("*") if path.is_file())
    # One in five each: manifest, the two indices, a sidecar, a shard.
    kinds = [
        [p for p in files if p.name.endswith(end)]
        for end in ("manifest.json", "train.parquet", "heldout.parquet", ".idx", ".tar")
    ]
    chosen = kinds[file % 5][file % len(kinds[file % 5])]
    original = chosen.read_bytes()
    damaged = bytearray(original[: place % len(original)] if change == 0 else original)
    if change:
        damaged[place % len(original)] ^= change
    chosen.write_bytes(damaged)
    try:
        found, said = everything(dataset.root), dataset.root
    except DataError as error:
        found, said = truth, str(error)
    finally:
        chosen.write_bytes(original)
    assert found == truth  # harmless: padding of the tar, words of the data card
    assert dataset.root in said


def members(**contents: bytes) -> bytes:
    """One sample's tar members, as a shard holds them."""
    file = io.BytesIO()
    writer = webdataset.TarWriter(file, encoder=False, mtime=0)
    writer.write({"__key__": "a/b"} | contents)
    end = writer.tarstream.offset
    writer.close()
    return file.getvalue()[:end]


def test_labels_of_both_kinds_are_read() -> None:
    assert parse(members(png=b"x", cls=b"2\n"), 3) == Sample("a/b", "png", b"x", (2,))
    assert parse(members(webp=b"x", json=b'{"labels": [0, 2]}'), 3).labels == (0, 2)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"png": b"x", "cls": b"3"}, "labels [3]"),
        ({"png": b"x", "cls": b"-1"}, "labels"),
        ({"png": b"x", "cls": b"1_0"}, "labels"),
        ({"png": b"x", "cls": b""}, "labels"),
        ({"png": b"x", "json": b'{"labels": [true]}'}, "labels [True]"),
        ({"png": b"x", "json": b'{"labels": 1}'}, "labels 1"),
        ({"png": b"x", "json": b"[0]"}, "labels None"),
        ({"png": b"x", "json": b"{"}, "cannot be read"),
        ({"png": b"x", "json": b"[" * 100_000}, "cannot be read"),
        ({"png": b"x", "cls": b"1", "json": b'{"labels": [1]}'}, "either a cls or a json"),
        ({"png": b"x"}, "either a cls or a json"),
        ({"cls": b"1"}, "needs one member"),
        ({"png": b"x", "jpg": b"x", "cls": b"1"}, "needs one member"),
        ({"pickle": b"cos\nsystem\n", "cls": b"1"}, "needs one member"),
    ],
)
def test_samples_that_break_the_form_are_refused(contents: dict[str, bytes], said: str) -> None:
    with pytest.raises(DataError) as refusal:
        parse(members(**contents), 3)
    assert said in str(refusal.value)
    assert "a/b" in str(refusal.value)


@given(cut=st.integers(0, 2100), flips=st.lists(st.tuples(st.integers(0, 2047), st.integers(1, 255)), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_bytes_parse_or_are_a_data_error(cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(members(png=b"x" * 100, json=b'{"labels": [0, 2]}'))
    for place, change in flips:
        data[place % len(data)] ^= change
    try:
        sample = parse(bytes(data[: max(0, len(data) - cut)]), 3)
    except DataError:
        return
    assert all(0 <= label < 3 for label in sample.labels)


@given(offsets=st.lists(st.integers(0, 2**63), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sidecar_with_a_valid_checksum_but_foreign_offsets_is_refused(tmp_path: Path, offsets: list[int]) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(bytes(2048))
    shard.with_suffix(".idx").write_bytes(pack_sidecar(offsets, [0, 0]))
    fits = offsets == sorted(set(offsets)) and offsets[-1] <= 2048 and all(offset % 512 == 0 for offset in offsets)
    if fits:
        assert read_sidecar(str(shard), 2).offsets.tolist() == offsets
    else:
        with pytest.raises(DataError, match="do not fit"):
            read_sidecar(str(shard), 2)


def test_few_files_stay_open(dataset: Dataset) -> None:
    split = dataset.split("train")
    shards = OpenShards(split.shard_paths, split.counts, limit=3)
    before = len(os.listdir("/proc/self/fd"))
    for shard in range(len(split.shard_paths)):
        shards.get(shard)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before
