"""`coatnet data order`: what it prints is what the stream reads, for one data set and for a mixture."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs import resolve
from configs.errors import InputError
from data_pipeline import mixture
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.stream import open_data, train_loader
from trainer.commands.config import resolve_command
from trainer.commands.data import data_command
from trainer.commands.order import order_command

BATCH = 12
COMMON = ["--data.global-batch", str(BATCH), "--data.workers", "0", "--data.lanes", "4", "--data.piece", "3"]
COMMON += ["--norm.replica-batch", "12"]


def picture(name: str, number: int, vocabulary: int) -> Picture:
    """A picture of the smallest kind that decodes."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, format="PNG")
    key = f"{name}/{number:03d}"
    return Picture(key, "png", (number % vocabulary,), key, file.getvalue)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """60 pictures of classes a, b, c and 40 of b, d."""
    folder = tmp_path_factory.mktemp("order")
    write_dataset([picture("one", n, 3) for n in range(60)], folder / "one", ["a", "b", "c"], "single", {}, 5)
    write_dataset([picture("two", n, 2) for n in range(40)], folder / "two", ["b", "d"], "single", {}, 7)
    return str(folder / "one"), str(folder / "two")


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert order_command(["demo-digits", *COMMON, "--json", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_is_what_the_stream_reads(
    sets: tuple[str, str], mixed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.mixture", f"{sets[0]}:2", f"{sets[1]}:1"] if mixed else ["--data.path", sets[0]]
    run = resolve_command("demo-digits", [*COMMON, *words])
    dataset = open_data(run)
    order = mixture.begin(run, dataset.split("train"))
    batches = list(train_loader(dataset, run, order, [(0, BATCH)], 0, 7))
    for step in (1, 5, 7):
        said, batch = rows(capsys, "--step", str(step), *words), batches[step - 1]
        assert [row["key"] for row in said] == batch.keys
        assert [[dataset.vocabulary.index(name) for name in row["labels"]] for row in said] == batch.labels[
            :, None
        ].tolist()
        assert [row["place"] for row in said] == list(range(BATCH))
        for row in said:
            root = row["data"] if mixed else sets[0]
            samples = open_data(resolve_command("demo-digits", ["--data.path", root])).split("train").samples
            assert 0 <= row["position"] < samples
            with tarfile.open(Path(root) / row["shard"]) as tar:
                assert tar.getnames()[2 * row["sample"]].partition(".")[0] == row["key"]


@pytest.mark.parametrize("mixed", [False, True])
def test_find_says_when_a_step_sees_it(sets: tuple[str, str], mixed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.mixture", f"{sets[0]}:2", f"{sets[1]}:1"] if mixed else ["--data.path", sets[0]]
    for wanted in rows(capsys, "--step", "3", *words)[::5]:
        by_key = rows(capsys, "--find", wanted["key"], *words)
        by_place = rows(capsys, "--find", f"{wanted['shard']}:{wanted['sample']}", "--epochs", "3", *words)
        if mixed:  # shards of both data sets may have this name
            by_place = [row for row in by_place if row["data"] == wanted["data"]]
        assert by_key == by_place
        assert [row["epoch"] for row in by_key] == [0, 1, 2]
        assert {name: wanted[name] for name in by_key[0]} in by_key
        for row in by_key:
            step = rows(capsys, "--step", str(row["step"]), *words)
            assert step[row["place"]] == row | {"key": wanted["key"], "labels": wanted["labels"]}


def test_words_for_people_and_a_run_file(
    sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resolve_command("demo-digits", [*COMMON, "--data.path", sets[0]])
    (tmp_path / "run.json").write_text(resolve.to_json(run))
    first = rows(capsys, "--step", "2", "--data.path", sets[0])[0]
    assert data_command(["order", str(tmp_path / "run.json"), "--step=2"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        f"epoch 0  position 12  step 2  place 0  {first['shard']}:{first['sample']}  {first['key']}  "
        f"labels {first['labels'][0]}"
    )
    assert data_command(["order", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: coatnet data order RECIPE --step N")


def test_batches_that_a_run_left_out_are_no_steps(
    sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resolve_command("demo-digits", [*COMMON, "--data.path", sets[0]])
    (tmp_path / "run.json").write_text(resolve.to_json(run))
    skipped: dict[int, list[list[int]]] = {4: [], 8: [[1, 3]], 9: []}
    for saved, ranges in skipped.items():
        folder = tmp_path / "checkpoints" / f"step-{saved:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"guard": {"skipped": ranges}}))
        if saved < 9:  # the newest is not complete
            (folder / "COMPLETE").touch()

    def of_run(*words: str) -> list[dict[str, Any]]:
        assert order_command([str(tmp_path / "run.json"), *words, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    steps: dict[int, int | None] = {1: 1, 2: None, 3: None, 4: 2, 5: 3}
    for batch, step in steps.items():
        plain = rows(capsys, "--step", str(batch), "--data.path", sets[0])
        if step is not None:
            assert of_run("--step", str(step)) == [row | {"step": step} for row in plain]
        if batch < 5:
            (found,) = of_run("--find", plain[2]["key"], "--epochs", "1")
            assert (found["step"], found["place"]) == (step, 2)
    lost = rows(capsys, "--step", "2", "--data.path", sets[0])[0]
    words = ["--find", f"{lost['shard']}:{lost['sample']}", "--epochs", "1"]
    assert order_command([str(tmp_path / "run.json"), *words]) == 0
    assert "place 0  left out by the guard  " in capsys.readouterr().out


def test_a_damaged_sample_is_shown_as_damaged(
    sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(sets[0], tmp_path / "copy"))
    first = rows(capsys, "--step", "1", "--data.path", str(root))[0]
    path = root / first["shard"]
    path.write_bytes(bytes(len(path.read_bytes())))
    again = rows(capsys, "--step", "1", "--data.path", str(root))
    assert "do not match their checksum" in again[0]["damage"]
    assert "key" not in again[0]
    assert len(again) == BATCH


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "0"], "--step '0': must be a whole number from 1"),
        (["--step", "1e3"], "must be a whole number"),
        (["--step"], "--step: needs one value"),
        (["--step", "1", "--step", "2"], "--step: needs one value"),
        ([], "needs either --step N or --find KEY"),
        (["--step", "1", "--find", "x"], "needs either --step N or --find KEY"),
        (["--step", "1", "--epochs", "2"], "--epochs belongs to --find"),
        (["--find", "nowhere"], "no shard of the training split of .*one holds this key"),
        (["--find", "train/shard-000000.tar:5"], "samples 0 to 4; nearest valid: train/shard-000000.tar:4"),
        (["--step", "1", "--data.synthetic"], "made-up samples have neither shards nor keys"),
        (["--step", "1", "--data.pth", "x"], "did you mean 'data.path'"),
    ],
)
def test_wrong_words_are_refused(sets: tuple[str, str], words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        order_command(["demo-digits", *COMMON, "--data.path", sets[0], *words])


def test_the_recipe_must_be_named() -> None:
    with pytest.raises(InputError, match="the recipe is missing"):
        order_command(["--step", "1"])
