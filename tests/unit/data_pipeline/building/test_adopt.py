"""Adopting tars: read where they are, never touched; what training could not read is refused."""

import multiprocessing
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from configs.errors import InputError
from data_pipeline.building.adopt import adopt
from data_pipeline.building.build import BUILD
from data_pipeline.building.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.shard import OpenShards
from trainer.cli_data import data_command


def tar(path: Path, first: int, count: int, **other: bytes) -> str:
    """A tar by webdataset's writer: samples with one of three labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number in range(first, first + count):
            label = {"cls": str(number % 3).encode()} | other
            writer.write({"__key__": f"a/{number:04d}", "jpg": b"p%d" % number} | label)
    return str(path)


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
