"""The benchmark of the data pipeline: every case is measured in every round, and the verdict follows from the rates."""

import json
import statistics
from pathlib import Path

import pytest

from configs import resolve
from configs.errors import InputError
from data_pipeline.building.build import Picture, write_dataset
from models import cost, spec
from trainer import cli
from trainer.bench import record as bench
from trainer.bench.data import Settings, made_up, measure
from trainer.commands.bench_data import bench_data_command

RECIPE = "coatnet0-in1k-224"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the made-up data set."""
    folder = tmp_path_factory.mktemp("made-up")
    made_up(folder / "set", 100)
    return folder / "set"


@pytest.fixture(scope="module")
def record(small: Path) -> bench.Record:
    settings = Settings(str(small), ("webdataset",), RECIPE, pictures=100, resolution=64, rounds=2)
    return measure(settings, resolve.load(RECIPE))


def test_every_case_is_measured_in_every_round(record: bench.Record, small: Path) -> None:
    cases = {"read", "decode", "pipeline", f"pipeline of {RECIPE}", "decode + crop alone", "webdataset"}
    assert record.samples.keys() == cases
    assert all(len(rates) == 2 and min(rates) > 0 for rates in record.samples.values())
    assert record.config["samples"] == 64  # one whole batch
    assert 50_000 < record.config["mean bytes"] < 66_000
    middle = {name: statistics.median(rates) for name, rates in record.samples.items()}
    assert middle["read"] > 3 * middle["decode"] > 3 * middle["pipeline"]
    assert record.command == (
        f"coatnet bench data {small} --against webdataset --recipe {RECIPE} --pictures 100 --resolution 64 --rounds 2"
    )


def test_the_verdict_follows_from_the_rates(record: bench.Record) -> None:
    model = resolve.load(RECIPE).model
    needed = 8 * 0.4 * 989.4e12 / (6 * cost.count(spec.of(model), model.resolution).multiply_adds)
    cores = needed / statistics.median(record.samples[f"pipeline of {RECIPE}"])
    said = record.summary[f"verdict for {RECIPE}"]
    assert said.startswith(
        f"{cores:.1f} cores like this one feed 8 x NVIDIA H100 with {needed:,.0f} images/s of coatnet0"
    )
    assert "an estimate" in said


def test_the_command_prints_and_writes_the_record(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small), "--pictures", "64", "--rounds", "1", "--resolution", "32", "--json", "--out", str(tmp_path)]
    assert cli.main(["bench", "data", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert bench.read(tmp_path / "data.json").samples.keys() == printed["samples"].keys()


def test_other_pictures_are_not_measured_against_others(tmp_path: Path) -> None:
    pictures = [Picture(f"k{n}", "png", (0,), str(n), lambda: b"\x89PNG") for n in range(100)]
    data = write_dataset(pictures, tmp_path / "set", ["a"], "single", {}, 50)
    with pytest.raises(InputError, match="has others than JPEGs"):
        measure(Settings(data.root, ("webdataset",), pictures=64, rounds=1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds 0: must be a whole number of at least 1"),
        (["--rounds", "x"], "--rounds x: must be a whole number"),
        (["--pictures", "63"], "nearest valid: 64"),
        (["--against", "webdatset"], "did you mean 'webdataset'"),
        (["--against", "webdataset", "webdataset"], "webdataset is given twice"),
        (["--against"], "--against needs a value"),
        (["--out"], "--out needs a value"),
        (["--round", "3"], "did you mean '--rounds'"),
        (["a", "--rounds", "3", "b"], "unexpected 'b'"),
        (["--json", "--json"], "given twice"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as refusal:
        bench_data_command(words)
    assert said in str(refusal.value)


def test_a_data_set_without_a_whole_batch_is_refused(tmp_path: Path) -> None:
    pictures = [Picture(f"k{n}", "png", (0,), str(n), lambda: b"\x89PNG") for n in range(50)]
    data = write_dataset(pictures, tmp_path / "set", ["a"], "single", {}, 50)
    with pytest.raises(InputError, match=r"\d+ pictures to read: must be at least 64, a batch"):
        measure(Settings(data.root))
