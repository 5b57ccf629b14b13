"""Adopting tars: read where they are, never touched; what training could not read is refused."""

import io
import json
import multiprocessing
import shutil
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from configs.errors import InputError
from configs.schema import Run
from data_pipeline.augment import targets
from data_pipeline.building.adopt import adopt
from data_pipeline.building.build import BUILD
from data_pipeline.building.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.merge import merge
from data_pipeline.mixture import begin
from data_pipeline.shard import OpenShards
from data_pipeline.stream import train_loader
from trainer.commands.data import data_command


def tar(path: Path, first: int, count: int, **other: bytes) -> str:
    """A tar by webdataset's writer: samples with one of three labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number in range(first, first + count):
            label = {"cls": str(number % 3).encode()} | other
            writer.write({"__key__": f"a/{number:04d}", "jpg": b"p%d" % number} | label)
    return str(path)


def encoded(number: int) -> bytes:
    """A JPEG of noise."""
    noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="JPEG")
    return file.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> list[str]:
    """Six of unequal size."""
    return [tar(tmp_path / "mine" / f"{number}.tar", 100 * number, 3 + number) for number in range(6)]


def keys(dataset: Dataset, name: str) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    split = dataset.split(name)
    shards = OpenShards(split.shard_paths, split.counts)
    read = [
        shards.get(shard).read(number, dataset.classes)
        for shard, count in enumerate(split.counts.tolist())
        for number in range(count)
    ]
    shards.close()
    return {sample.key: (sample.picture, sample.labels) for sample in read}


@pytest.mark.parametrize("workers", [1, 2])
def test_tars_are_adopted_as_they_are(tars: list[str], tmp_path: Path, workers: int) -> None:
    before = {path: Path(path).read_bytes() for path in tars}
    dataset = adopt(tars[:5], tmp_path / "out", tars[5:], workers=workers)
    wanted = {
        f"a/{100 * t + n:04d}": (b"p%d" % (100 * t + n), ((100 * t + n) % 3,)) for t in range(5) for n in range(3 + t)
    }
    assert keys(dataset, "train") == wanted
    assert dataset.split("train").counts.tolist() == [3, 4, 5, 6, 7]
    assert dataset.split("heldout").samples == 8
    assert (dataset.label_kind, dataset.vocabulary) == ("single", ("0", "1", "2"))
    assert dataset.label_counts == tuple(sum(labels == (n,) for _, labels in wanted.values()) for n in range(3))
    assert verify(tmp_path / "out").problems == ()
    assert {path: Path(path).read_bytes() for path in tars} == before
    assert sorted(path.name for path in Path(tars[0]).parent.iterdir()) == [f"{n}.tar" for n in range(6)]
    assert not (tmp_path / "out" / BUILD).exists()
    stamps = {path: path.lstat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    adopt(tars[:5], tmp_path / "out", tars[5:])
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps


def test_tars_of_other_writers(tmp_path: Path) -> None:
    """GNU tar of a folder, Python's pax format with long names: folders between samples, members to be ignored."""
    for number in range(8):
        place = (
            tmp_path / "files" / f"{'long' * 20 if number % 2 else 'short'}-{number // 4}" / f"{'name' * 20}{number}"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        for extension, data in (("png", b"x%d" % number), ("json", b'{"labels": [0, 2], "by": "me"}'), ("txt", b"t")):
            place.with_suffix(f".{extension}").write_bytes(data)
    made = [tmp_path / "gnu.tar", tmp_path / "pax.tar"]
    subprocess.run(["tar", "--sort=name", "-cf", str(made[0]), "-C", str(tmp_path / "files"), "."], check=True)
    with tarfile.open(made[1], "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted((tmp_path / "files").rglob("*.*")):
            archive.add(path, str(path.relative_to(tmp_path / "files")))
    for path in made:
        dataset = adopt([str(path)], tmp_path / f"out-{path.stem}")
        assert (dataset.label_kind, dataset.split("train").samples) == ("multi", 8)
        read = keys(dataset, "train")
        assert {(picture, labels) for picture, labels in read.values()} == {(b"x%d" % n, (0, 2)) for n in range(8)}
        assert verify(dataset.root).problems == ()


def test_what_training_could_not_read_is_refused(tmp_path: Path) -> None:
    good = tar(tmp_path / "good.tar", 0, 3)
    for name, other in (("two", {"png": b"x"}), ("label", {"cls": b"dog"})):
        bad = tar(tmp_path / f"{name}.tar", 0, 3, **other)
        with pytest.raises(InputError, match=r"3 samples cannot be read .*a/0000.*`coatnet data build` writes new"):
            adopt([good, bad], tmp_path / "out")
    with pytest.raises(DataError, match="not finished"):
        open_dataset(tmp_path / "out")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(good).read_bytes()[:2600])
    with pytest.raises(InputError, match=r"cut\.tar: .*(not readable|ends after)"):
        adopt([str(cut)], tmp_path / "out")
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    with pytest.raises(InputError, match=r"empty\.tar: holds no samples"):
        adopt([str(tmp_path / "empty.tar")], tmp_path / "out")
    shutil.copy(good, tmp_path / "shard.tar.gz")
    for wrong in ([good, good], [str(tmp_path / "none.tar")], [str(tmp_path / "shard.tar.gz")]):
        with pytest.raises(InputError, match=r"given 2 times|no such file, or no uncompressed"):
            adopt(wrong, tmp_path / "out")
    adopt([good], tmp_path / "out")  # what was refused leaves nothing in the way


def test_names_for_the_classes(tars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names").write_text("x\ny\nz\nnever\n")
    words = ["adopt", *tars, "--vocabulary", str(tmp_path / "names"), "--out", str(tmp_path / "out")]
    assert data_command(words) == 0
    assert "4 classes, single labels" in capsys.readouterr().out
    assert open_dataset(tmp_path / "out").vocabulary == ("x", "y", "z", "never")
    (tmp_path / "names").write_text("x\ny\n")
    with pytest.raises(InputError, match="names 2 classes, but the tars have label 2"):
        data_command([*words[:-1], str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("field", "value", "names", "vocabulary", "kind"),
    [
        ("label", lambda n: n % 3, "", ("0", "1", "2"), "single"),
        ("label", lambda n: "cdb"[n % 3], "", ("b", "c", "d"), "single"),
        ("labels", lambda n: ["cdb"[n % 3], "b"], "", ("b", "c", "d"), "multi"),
        ("a.class", lambda n: "cdb"[n % 3], "d\nb\nc\nnever\n", ("d", "b", "c", "never"), "single"),
        ("label", lambda n: n % 3, "d\nb\nc\n", ("d", "b", "c"), "single"),
    ],
)
def test_labels_in_another_field(
    tmp_path: Path,
    run_of: Callable[..., Run],
    field: str,
    value: Callable[[int], str | int | list[str]],
    names: str,
    vocabulary: tuple[str, ...],
    kind: str,
) -> None:
    file = tmp_path / "mine.tar"
    with webdataset.TarWriter(str(file), encoder=False) as writer:
        for number in range(24):
            notes: object = value(number)
            for name in reversed(field.split(".")):
                notes = {name: notes, "weights": "heavy"}
            content = {"jpg": encoded(3 * number), "cls": b"a note", "json": json.dumps(notes).encode()}
            writer.write({"__key__": f"a/{number:04d}", **content})
    (tmp_path / "names").write_text(names)
    words = ["adopt", str(file), "--out", str(tmp_path / "out"), "--label-field", field]
    assert data_command([*words, "--vocabulary", str(tmp_path / "names")] if names else words) == 0
    data = open_dataset(tmp_path / "out")
    assert (data.vocabulary, data.label_kind) == (vocabulary, kind)
    wanted = {}
    for number in range(24):
        said = value(number)
        found = (
            [said]
            if isinstance(said, int)
            else [vocabulary.index(w) for w in ([said] if isinstance(said, str) else said)]
        )
        wanted[f"a/{number:04d}"] = list(dict.fromkeys(found))
    counts = Counter(label for labels in wanted.values() for label in labels)
    assert data.label_counts == tuple(counts[number] for number in range(len(vocabulary)))
    assert verify(data.root, deep=True).problems == ()
    run = run_of(path=data.root)
    both = merge([data, data], [1, 1])  # a mixture knows it of each of its data sets
    for opened in (data, both):
        loader = train_loader(opened, run, begin(run, opened.split("train")), [(0, 12)], 0, 2)
        for batch in loader:
            for key, row in zip(batch.keys, batch.labels.reshape(12, -1).tolist(), strict=True):
                assert [label for label in row if label >= 0] == wanted[key]
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"label_field": "{field}"', '"label_field": "other"'))
    with pytest.raises(DataError, match="fingerprint"):
        open_dataset(tmp_path / "out")


def test_labels_in_no_such_field_are_refused(tmp_path: Path) -> None:
    for name, notes in (("none", {"other": 1}), ("float", {"label": 1.5}), ("true", {"label": [True]})):
        bad = tar(tmp_path / f"{name}.tar", 0, 3, json=json.dumps(notes).encode())
        with pytest.raises(InputError, match=r"3 samples cannot be read .*(has no field|must be a name)"):
            adopt([bad], tmp_path / "out", label_field="label")
    good = tar(tmp_path / "good.tar", 0, 3, json=b'{"label": "dog"}')
    (tmp_path / "names").write_text("cat\n")
    with pytest.raises(InputError, match="label 'dog'"):
        adopt([good], tmp_path / "out", vocabulary=str(tmp_path / "names"), label_field="label")
    with pytest.raises(InputError, match=r"--label-field NAME"):
        adopt([tar(tmp_path / "plain.tar", 0, 3, cls=b"dog")], tmp_path / "out")


def test_soft_labels_reach_the_loss(tmp_path: Path, run_of: Callable[..., Run]) -> None:
    """From the tar through adoption, the loader and its processes to the targets of both losses."""
    shares = [(0.25, 0.75), (1.0, 0.5), (0.5, 0.0)]
    file = tmp_path / "soft.tar"
    with webdataset.TarWriter(str(file), encoder=False) as writer:
        for number in range(24):
            notes = {"labels": [number % 3, 3], "weights": shares[number % 3]}
            writer.write({"__key__": f"{number:04d}", "jpg": encoded(3 * number), "json": json.dumps(notes).encode()})
    data = adopt([str(file)], tmp_path / "out")
    assert data.label_kind == "multi"
    for workers in (0, 2):
        run = run_of(workers, path=data.root)
        (batch,) = train_loader(data, run, begin(run, data.split("train")), [(0, 12)], 0, 1)
        for row, key in enumerate(batch.keys):
            wanted = torch.zeros(4)
            wanted[int(key) % 3], wanted[3] = shares[int(key) % 3]
            assert torch.equal(targets(batch, 4, 0.0, "sigmoid")[row], wanted)
            mass = max(1.0, float(wanted.sum()))
            assert torch.allclose(targets(batch, 4, 0.0, "softmax")[row], wanted / mass)
    with pytest.raises(InputError, match="soft labels, which only `coatnet data adopt` takes"):
        data_command(["build", str(file), "--out", str(tmp_path / "built")])


def test_a_tar_that_changes_is_noticed(tars: list[str], tmp_path: Path) -> None:
    adopt(tars, tmp_path / "out")
    data = bytearray(Path(tars[2]).read_bytes())
    data[512] ^= 1
    Path(tars[2]).write_bytes(data)
    assert {finding.shard for finding in verify(tmp_path / "out").findings} == {"train/shard-000002.tar"}
    with pytest.raises(InputError, match="holds another data set"):
        adopt(tars, tmp_path / "out")
    Path(tars[2]).unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar: missing"):
        open_dataset(tmp_path / "out")


def test_a_killed_call_is_continued(tmp_path: Path) -> None:
    tars = [tar(tmp_path / "mine" / f"{number:03d}.tar", 100 * number, 20) for number in range(60)]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=adopt, args=(tars, tmp_path / "out"))
    process.start()
    records = tmp_path / "out" / BUILD / "records"
    while process.is_alive() and not (records.is_dir() and len(list(records.glob("*.json"))) >= 20):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9
    first = tmp_path / "out" / "train" / "shard-000000.idx"
    stamp = first.stat().st_mtime_ns
    dataset = adopt(tars, tmp_path / "out")
    assert first.stat().st_mtime_ns == stamp
    assert dataset.split("train").fingerprint == adopt(tars, tmp_path / "other").split("train").fingerprint
    assert verify(tmp_path / "out").problems == ()
