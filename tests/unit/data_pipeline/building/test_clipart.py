"""Clip art: labels of all places, copies made one, what is left out counted; packages by real apt-get and dpkg-deb."""

import hashlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from data_pipeline.building.clipart import MIN_SHORT_SIDE, clipart
from data_pipeline.building.verify import verify
from data_pipeline.decode import decode
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.shard import OpenShards, Sample
from trainer.commands.data import data_command

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
needs_apt = pytest.mark.skipif(None in (shutil.which("apt-get"), shutil.which("dpkg-deb")), reason="needs apt-get")


def draw(path: Path, number: int, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Path:
    """A PNG of its own noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """150 pictures below share/art, in all colour modes, with links, copies and useless files; a link leads out."""
    art = tmp_path / "tree" / "share" / "art"
    modes = ["RGB", "RGBA", "P", "L", "LA"]
    for number in range(60):
        draw(art / "animals" / f"animal.{number}.png", number, modes[number % 5])
        draw(art / "animals" / "birds" / f"bird {number}.png", 100 + number, modes[number % 5])
    for number in range(30):
        draw(art / "plants" / f"plant{number}.png", 200 + number)
    for number in range(3):
        draw(art / "rare" / f"rare{number}.png", 300 + number)
        draw(art / "animals" / "rare" / f"also{number}.png", 400 + number)
        draw(art / "unsorted" / f"none{number}.png", 500 + number)
    os.symlink("../animals/birds/bird 5.png", art / "plants" / "linked.png")
    with Image.open(art / "plants" / "plant1.png") as same:
        same.save(art / "unsorted" / "copy.png", compress_level=0)
        same.save(art / "animals" / "copy.png", compress_level=1)
    (art / "plants" / "broken.png").write_bytes(b"no picture")
    os.symlink("loop.png", art / "plants" / "loop.png")
    os.symlink(draw(tmp_path / "private" / "secret.png", 999), art / "plants" / "secret.png")
    return tmp_path / "tree"


def samples(dataset: Dataset) -> dict[str, list[Sample]]:
    """Every sample of each split."""
    read = {}
    for name, split in dataset.splits.items():
        shards = OpenShards(split.shard_paths, split.counts)
        places = [(shard, number) for shard, count in enumerate(split.counts.tolist()) for number in range(count)]
        read[name] = [shards.get(shard).read(number, dataset.classes) for shard, number in places]
    return read


def labels_of(dataset: Dataset, name: str) -> set[str]:
    found = [sample for split in samples(dataset).values() for sample in split if sample.key.startswith(name + "-")]
    assert len(found) == 1
    return {dataset.vocabulary[label] for label in found[0].labels}


def test_labels_are_the_folders_of_all_copies_and_those_above(tree: Path, tmp_path: Path) -> None:
    dataset = clipart(tmp_path / "out", tree)
    assert (dataset.label_kind, dataset.vocabulary) == ("multi", ("animals", "animals/birds", "plants"))
    assert labels_of(dataset, "animal-7") == {"animals"}
    assert labels_of(dataset, "bird-6") == {"animals", "animals/birds"}
    assert labels_of(dataset, "bird-5") == {"animals", "animals/birds", "plants"}  # a link
    assert labels_of(dataset, "also2") == {"animals"}
    keys = [sample.key for split in samples(dataset).values() for sample in split]
    copies = [key for key in keys if key.startswith(("plant1-", "copy-"))]
    assert len(copies) == 1  # three files of the same pixels
    assert labels_of(dataset, copies[0].rpartition("-")[0]) == {"animals", "plants"}
    counted = {name: dataset.card[name] for name in ("skipped", "rare_labels", "unlabelled")}
    assert counted == {"skipped": 1, "rare_labels": 2, "unlabelled": 6}
    assert len(keys) == 60 + 60 + 30 + 3


def test_bytes_stay_and_copies_never_part(tree: Path, tmp_path: Path) -> None:
    dataset = clipart(tmp_path / "out", tree)
    read = samples(dataset)
    files = {path.read_bytes() for path in tree.rglob("*.png") if path.is_file()}
    pixels = {}
    for name, split in read.items():
        assert all(sample.picture in files for sample in split)
        pixels[name] = {decode(sample.picture, 10**6).numpy().tobytes() for sample in split}
        assert len(pixels[name]) == len(split)
    assert not pixels["train"] & pixels["heldout"]
    assert not [sample.key for split in read.values() for sample in split if sample.key.startswith("secret")]
    counts = [sum(label in sample.labels for sample in read["train"]) for label in range(3)]
    assert dataset.label_counts == tuple(counts)
    assert min(counts) >= 20
    assert min(sum(label in sample.labels for sample in read["heldout"]) for label in range(3)) >= 3
    assert verify(dataset.root).problems == ()


def test_a_second_call_writes_nothing_and_other_settings_are_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clipart(out, tree)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    clipart(out, tree)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    with pytest.raises(InputError, match="holds another data set"):
        clipart(out, tree, short_side=MIN_SHORT_SIDE)
    draw(tree / "share" / "art" / "plants" / "new.png", 1000)
    with pytest.raises(InputError, match="holds another data set"):
        clipart(out, tree)


def test_large_pictures_are_stored_smaller(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(40):
        draw(source / "a" / f"small{number}.png", number)
        draw(source / "b" / f"large{number}.png", 100 + number, ("RGBA", "P", "LA")[number % 3], (42, 21))
    grey = np.full((64, 64), 25700, dtype=np.uint16)  # 16 bits: 100 of 255
    Image.fromarray(grey).save(source / "b" / "deep.png")
    dataset = clipart(tmp_path / "out", source, short_side=20)
    for split in samples(dataset).values():
        for sample in split:
            with Image.open(io.BytesIO(sample.picture)) as picture:
                small = sample.key.startswith("small")
                assert picture.size == ((9, 7) if small else (20, 20) if "deep" in sample.key else (40, 20))
            if small:
                assert sample.picture == (source / "a" / f"{sample.key.partition('-')[0]}.png").read_bytes()
            if "deep" in sample.key:
                assert set(decode(sample.picture, 10**6).flatten().tolist()) == {100}
    kept = clipart(tmp_path / "kept", source)
    assert [{sample.key for sample in split} for split in samples(dataset).values()] == [
        {sample.key for sample in split} for split in samples(kept).values()
    ]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no PNG files"),
        (lambda path: draw(path / "a" / "x.png", 1), "no folder holds 20 training and 3 held-out ones"),
    ],
)
def test_a_useless_source_is_refused(tmp_path: Path, prepare: Callable[[Path], object], said: str) -> None:
    prepare(tmp_path / "source")
    with pytest.raises(InputError, match=said):
        clipart(tmp_path / "out", tmp_path / "source")
    assert not (tmp_path / "out").exists()


def package(tree: Path, folder: Path) -> Path:
    """A real package of the pictures, as Debian's is laid out."""
    root = folder / "build"
    shutil.copytree(tree, root / "usr", symlinks=True)
    (root / "DEBIAN").mkdir()
    control = "Package: openclipart-png\nVersion: 1\nArchitecture: all\nMaintainer: test\nDescription: test\n"
    (root / "DEBIAN" / "control").write_text(control)
    made = folder / "repository" / "openclipart-png_1_all.deb"
    made.parent.mkdir()
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@needs_dpkg
def test_a_package_file_gives_the_same_samples(tree: Path, tmp_path: Path) -> None:
    made = package(tree, tmp_path)
    out = tmp_path / "there" / "out"
    dataset = clipart(out, made)
    from_folder = clipart(tmp_path / "folder", tree)
    assert [part.fingerprint for part in dataset.splits.values()] == [
        part.fingerprint for part in from_folder.splits.values()
    ]
    assert dataset.card["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    assert os.listdir(out.parent) == ["out"]  # nothing unpacked is left
    clipart(out)  # made from the package: need not be fetched
    with pytest.raises(InputError, match="cannot be made"):
        clipart(made / "out", made)
    made.write_bytes(made.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"dpkg-deb --extract .* failed: .*--source clipart PATH"):
        clipart(tmp_path / "other", made)


def apt(folder: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    """Let the real apt-get know one repository, a folder, and nothing of this machine's."""
    for name in ("lists/partial", "cache/archives/partial", "empty"):
        (folder / "apt" / name).mkdir(parents=True)
    (folder / "apt" / "sources.list").write_text(f"deb [trusted=yes] file:{repository} ./\n")
    (folder / "apt" / "status").write_text("")
    settings = {
        "Dir::State": folder / "apt",
        "Dir::State::lists": folder / "apt" / "lists",
        "Dir::State::status": folder / "apt" / "status",
        "Dir::Cache": folder / "apt" / "cache",
        "Dir::Etc::sourcelist": folder / "apt" / "sources.list",
        "Dir::Etc::sourceparts": folder / "apt" / "empty",
        "Dir::Etc::parts": folder / "apt" / "empty",
        "APT::Sandbox::User": "",
    }
    (folder / "apt" / "conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(folder / "apt" / "conf"))


@needs_apt
def test_the_package_is_fetched(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package(tree, tmp_path)
    data = made.read_bytes()
    control = subprocess.run(["dpkg-deb", "--field", str(made)], check=True, capture_output=True, text=True).stdout
    entry = f"Filename: ./{made.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    (made.parent / "Packages").write_text(control + entry)
    apt(tmp_path, monkeypatch, made.parent)
    out = tmp_path / "there" / "out"
    with pytest.raises(InputError, match=r"apt-get download .* failed: .*apt-get update.*--source clipart PATH"):
        clipart(out)  # the list of packages was not read yet
    assert os.listdir(out.parent) == []
    subprocess.run(["apt-get", "update"], check=True, capture_output=True)
    fetched = clipart(out)
    assert os.listdir(out.parent) == ["out"]
    clipart(tmp_path / "other", made)
    assert json.loads((out / "manifest.json").read_text()) == json.loads(
        (tmp_path / "other" / "manifest.json").read_text()
    )
    assert fetched.card["package"] == made.name


def test_elsewhere_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"apt-get, which is not here; take the package openclipart-png"):
        clipart(tmp_path / "out")
    (tmp_path / "some.deb").write_bytes(b"x")
    with pytest.raises(InputError, match=r"dpkg-deb, which is not here; .* --source clipart PATH"):
        clipart(tmp_path / "out", tmp_path / "some.deb")


def test_the_command(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert data_command(["demo", "--source", "clipart", str(tree), "--out", out, "--short-side", "16"]) == 0
    assert "3 classes, multi labels" in capsys.readouterr().out
    assert open_dataset(out).card["short_side"] == 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "clipart", "--short-side", "wide"], "must be a number of pixels"),
        (["--source", "clipart", "--short-side", "3"], "must be 0 or at least 16"),
        (["--source", "digits", "--short-side", "64"], "--short-side belongs to --source clipart"),
        (["--source", "clipart", "--skip-unreadable"], "--skip-unreadable belongs to --source folder"),
        (["--source", "digits", "x"], "takes no path"),
        (["--source", "clip-art"], "did you mean 'clipart'"),
        (["--source", "clipart", "x", "y"], "unexpected 'y'"),
    ],
)
def test_wrong_words_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        data_command(["demo", "--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()
