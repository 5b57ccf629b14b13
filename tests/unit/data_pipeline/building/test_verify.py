"""`verify`: every finding is reported with its place, in any number of processes, and written to a quarantine."""

import json
import os
import shutil
from pathlib import Path

import pytest

from configs.errors import InputError
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.building.verify import verify, verify_command
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.shard import read_sidecar
from trainer.commands.data import data_command


def flip(path: Path, sample: int, samples: int = 6) -> None:
    """Change one byte of a sample's picture."""
    begin = int(read_sidecar(str(path), samples).offsets[sample])
    data = bytearray(path.read_bytes())
    data[begin + 600] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.root, tmp_path / "copy"))


def test_a_sound_data_set_has_no_findings(dataset: Dataset) -> None:
    report = verify(dataset.root, deep=True)
    assert (report.samples, report.decoded, report.problems, report.findings) == (70, 70, (), ())
    assert "decoded 70 pictures; all checksums match" in verify_command(dataset.root, deep=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_finding_is_reported(copy: Path, tmp_path: Path, workers: int) -> None:
    for shard, sample in ((1, 3), (1, 5), (4, 0)):
        flip(copy / "train" / f"shard-00000{shard}.tar", sample)
    report = verify(copy, workers=workers)
    found = [(finding.shard, finding.sample) for finding in report.findings]
    first, second = "train/shard-000001.tar", "train/shard-000004.tar"
    assert found == [(first, -1), (first, 3), (first, 5), (second, -1), (second, 0)]
    assert report.per_shard == ((first, 3), (second, 2))
    assert list(report.problems) == [finding.reason for finding in report.findings]
    with pytest.raises(DataError) as refusal:
        verify_command(str(copy), workers=workers, quarantine=str(tmp_path / "bad.jsonl"))
    for part in ("5 problems", f"{first}: 3", f"{second}: 2", "5 findings written to"):
        assert part in str(refusal.value)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["sample"]) for line in lines] == found
    assert all(set(line) == {"shard", "sample", "key", "reason"} and line["reason"] for line in lines)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_missing_shards_are_reported_beside_other_damage(copy: Path, workers: int) -> None:
    (copy / "train" / "shard-000000.tar").unlink()
    (copy / "train" / "shard-000003.idx").unlink()
    torn = copy / "train" / "shard-000005.tar"
    torn.write_bytes(torn.read_bytes()[:-512])
    (copy / "heldout" / "shard-000000.tar").unlink()
    flip(copy / "train" / "shard-000002.tar", 1)
    found = [(finding.shard, finding.sample) for finding in verify(copy, workers=workers).findings]
    wanted = [(0, -1), (2, -1), (2, 1), (3, -1), (5, -1)]
    train = [(f"train/shard-00000{shard}.tar", sample) for shard, sample in wanted]
    assert sorted(found) == [("heldout/shard-000000.tar", -1), *train]
    with pytest.raises(DataError) as refusal:
        verify_command(str(copy))
    for part in ("6 problems", "shard-000000.tar: missing", "shard-000003.idx: missing", "the manifest says"):
        assert part in str(refusal.value)
    with pytest.raises(DataError, match=r"shard-000000\.tar: missing"):
        open_dataset(copy)


def test_a_damaged_sidecar_is_a_finding_about_the_shard(copy: Path) -> None:
    path = copy / "train" / "shard-000002.idx"
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    (finding,) = verify(copy).findings
    assert (finding.shard, finding.sample) == ("train/shard-000002.tar", -1)
    assert "do not match their checksum" in finding.reason


def test_only_a_deep_look_finds_what_cannot_be_decoded(tmp_path: Path, dataset: Dataset) -> None:
    pictures = [Picture(f"k{n}", "png", (0,), f"k{n}", b"no picture".strip) for n in range(30)]
    write_dataset(pictures, tmp_path / "set", ["a"], "single", {}, 10)
    assert verify(tmp_path / "set").problems == ()
    report = verify(tmp_path / "set", deep=True)
    assert (len(report.findings), report.decoded) == (30, 0)
    assert {finding.key for finding in report.findings} == {f"k{n}" for n in range(30)}
    assert all("cannot be decoded" in finding.reason for finding in report.findings)


def test_the_command(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_command(["verify", str(copy), "--deep", "--quarantine", str(tmp_path / "none")]) == 0
    assert "all checksums match" in capsys.readouterr().out
    assert (tmp_path / "none").read_text() == ""
    flip(copy / "train" / "shard-000001.tar", 2)
    assert data_command(["verify", str(copy), "--json", "--quarantine", str(tmp_path / "bad")]) == 76
    report = json.loads(capsys.readouterr().out)
    assert [finding["sample"] for finding in report["findings"]] == [-1, 2]
    assert len((tmp_path / "bad").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="cannot be written"):
        data_command(["verify", str(copy), "--json", "--quarantine", str(tmp_path / "no" / "bad")])
    with pytest.raises(InputError, match="--workers 0: must be at least 1"):
        data_command(["verify", str(copy), "--workers", "0"])
    with pytest.raises(InputError, match="verify reads local folders"):
        data_command(["verify", "http://host/set"])
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
