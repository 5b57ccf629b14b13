"""Builds in tasks: the same bytes however they are cut, killed and continued; what is left out is counted."""

import fcntl
import io
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from data_pipeline.building.build import BUILD
from data_pipeline.building.plan import Options, Plan, plan
from data_pipeline.building.tasks import build, merge, run
from data_pipeline.building.verify import verify
from data_pipeline.decode import decode
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.shard import OpenShards, Sample
from trainer.commands.data import data_command

OPTIONS = Options(shard_samples=5, heldout=0.2)
KILLED = int(os.environ.get("COATNET_KILLED_BUILDS", "3"))  # of the slow campaign, each killed until it is through


def write(path: Path, number: int, size: tuple[int, int] = (24, 31), form: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format=form or None)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 pictures of three classes, and four copies: two of a class, two of another."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    for number in range(150):
        write(root / "abc"[number % 3] / f"{number}.{('png', 'jpg')[number % 2]}", number)
    for name, original in (("a/copy.png", "a/0.png"), ("b/copy.jpg", "b/1.jpg"), ("c/x.png", "a/6.png")):
        (root / name).write_bytes((root / original).read_bytes())
    (root / "a/more.png").write_bytes((root / "a/6.png").read_bytes())
    return root


@pytest.fixture(scope="session")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that an undisturbed build makes of them."""
    out = tmp_path_factory.mktemp("built") / "whole"
    build(str(source), out, OPTIONS)
    return out


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def samples(dataset: Dataset) -> list[tuple[str, Sample]]:
    """(split, sample) of everything."""
    read = []
    for name, split in dataset.splits.items():
        shards = OpenShards(split.shard_paths, split.counts)
        for shard, count in enumerate(split.counts.tolist()):
            read += [(name, shards.get(shard).read(number, dataset.classes)) for number in range(count)]
        shards.close()
    return read


def wait_for(done: Callable[[], object], process: multiprocessing.process.BaseProcess) -> None:
    """Until something is there or the process has ended."""
    deadline = time.monotonic() + 60
    while not done() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_whole_data_set_is_sound(source: Path, whole: Path) -> None:
    dataset = open_dataset(whole)
    read = samples(dataset)
    assert {path.read_bytes() for path in source.rglob("*.*")} == {sample.picture for _, sample in read}
    assert len(read) == 150
    assert 15 < dataset.split("heldout").samples < 50
    for split in dataset.splits.values():
        assert set(split.counts[:-1].tolist()) == {5}
        assert split.counts[-1] <= 5
    for _, sample in read:
        assert sample.key.startswith(f"{dataset.vocabulary[sample.labels[0]]}/")
    classes = [sample.labels[0] for name, sample in read if name == "train"]
    assert sorted(classes) != classes  # shuffled
    assert dataset.label_counts == tuple(classes.count(number) for number in range(3))
    facts = dataset.card["statistics"]
    assert isinstance(facts, dict)
    assert (facts["listed"], facts["duplicates_removed"], facts["duplicates_of_other_label"]) == (154, 4, 1)
    assert (facts["formats"], facts["short_sides"]) == ({"jpg": 75, "png": 75}, {"to 64": 150})
    assert verify(whole, deep=True).problems == ()
    assert {path.name for path in whole.iterdir()} == {
        "CARD.md", "manifest.json", "train", "heldout", "train.parquet", "heldout.parquet"
    }  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 3, 100])
def test_any_number_of_tasks_in_any_order_gives_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path, tasks: int
) -> None:
    made = plan(str(source), tmp_path / "out", OPTIONS, tasks)
    assert isinstance(made, Plan)
    assert len(made.tasks) == max(2, min(tasks, sum(task.shards for task in made.tasks)))
    for number in reversed(range(1, len(made.tasks))):
        run(tmp_path / "out", number)
    with pytest.raises(InputError, match=rf"1 of {len(made.tasks)} tasks are not finished: 0; run them"):
        merge(tmp_path / "out")
    with pytest.raises(DataError, match="not finished"):
        open_dataset(tmp_path / "out")
    run(tmp_path / "out", 0)
    run(tmp_path / "out", 0)
    merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    merge(tmp_path / "out")
    run(tmp_path / "out", 0)
    assert contents(tmp_path / "out") == contents(whole)


def test_several_processes_give_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    build(str(source), tmp_path / "out", OPTIONS, workers=2)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_build_killed_at_random_moments_goes_on_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    draw, out = random.Random(3), tmp_path / "out"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.building.tasks"])
    kills = seen = 0
    for least in (1, 2, 4, 7, 11, 14, 17, 20, 23, 26, 29):
        process = context.Process(target=build, args=(str(source), out, OPTIONS))
        process.start()
        # Files of the build that are there when it is killed: parts, then tasks, then shards and records.
        wait_for(lambda n=least: sum("." in x for _, d, f in os.walk(out) for x in d + f) >= n, process)  # type: ignore
        time.sleep(draw.random() * 0.01)
        process.kill()
        process.join()
        kills += process.exitcode == -9
        seen += (out / BUILD / "plan.json").exists()
        if not (out / "manifest.json").exists():
            with pytest.raises(DataError):
                open_dataset(out)
        for tar in out.glob("*/*.tar"):  # whatever has the name of a shard is one, to the byte
            assert tar.read_bytes() == (whole / tar.relative_to(out)).read_bytes()
    assert kills >= 3
    assert seen >= 1
    build(str(source), out, OPTIONS)
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_the_command_killed_at_random_moments(source: Path, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(5)
    command = [sys.executable, "-m", "trainer.cli", "data", "build", str(source), "--workers", "2"]
    command += ["--shard-samples", "5", "--heldout", "0.2", "--out"]
    for number in range(KILLED):
        out = tmp_path / str(number)
        while not (out / "manifest.json").exists():
            process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(draw.random() * 20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        subprocess.run([*command, str(out)], check=True, capture_output=True)
        assert contents(out) == contents(whole)


def test_one_at_a_time(source: Path, tmp_path: Path) -> None:
    plan(str(source), tmp_path / "out", OPTIONS)
    with open(tmp_path / "out" / BUILD / "tasks" / "000000.parquet") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process that does the task holds it
        with pytest.raises(InputError, match="task 0: another process is doing it"):
            run(tmp_path / "out", 0)
        run(tmp_path / "out", 1)
    run(tmp_path / "out", 0)


def test_unreadable_pictures_are_refused_or_left_out_and_shards_stay_full(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for number in range(60):
        write(root / "abc"[number % 3] / f"{number}.jpg", number, (40, 40))
    (root / "a" / "page.jpg").write_text("<html>")  # seen when the build is planned
    for number in (3, 8, 20):  # a sound header and no pixels: seen only when it is decoded
        path = root / "abc"[number % 3] / f"{number}.png"
        write(path, number)
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match=r"1 of 64 pictures cannot be used: a/page\.jpg: no readable JPEG, PNG or Web"):
        build(str(root), tmp_path / "out", OPTIONS)
    (root / "a" / "page.jpg").unlink()
    with pytest.raises(InputError, match=r"\.png: picture cannot be decoded: .* with --skip-unreadable"):
        build(str(root), tmp_path / "out", OPTIONS)
    skip = replace(OPTIONS, skip_unreadable=True)
    dataset = build(str(root), tmp_path / "out", skip)
    assert len(samples(dataset)) == 60
    facts = dataset.card["statistics"]
    assert isinstance(facts, dict)
    assert (facts["unreadable"], len(facts["unreadable_shown"])) == (3, 3)
    build(str(root), tmp_path / "again", skip)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    one = plan(str(root), tmp_path / "one", skip, tasks=1)
    assert isinstance(one, Plan)
    for number in range(len(one.tasks)):
        run(tmp_path / "one", number)
    for split in merge(tmp_path / "one").splits.values():
        assert set(split.counts[:-1].tolist()) <= {5}  # full but the task's last, although pictures were left out


def test_large_pictures_are_stored_smaller(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / "in" / "a" / f"large{number}.png", number, (60, 90 + number))
        write(tmp_path / "in" / "b" / f"small{number}.png", 100 + number, (30, 90))
    options = replace(OPTIONS, short_side=32, quality=80)
    dataset = build(str(tmp_path / "in"), tmp_path / "out", options, workers=2)
    for _, sample in samples(dataset):
        name = sample.key.rpartition("/")[2].partition("-")[0]
        height, width = decode(sample.picture, 10**6).shape[1:]
        if name.startswith("small"):
            assert sample.picture == (tmp_path / "in" / "b" / f"{name}.png").read_bytes()
        else:
            assert (sample.extension, height) == ("jpg", 32)
            assert width == round((90 + int(name[5:])) * 32 / 60)
            with Image.open(io.BytesIO(sample.picture)) as picture:
                assert picture.format == "JPEG"
    facts = dataset.card["statistics"]
    assert isinstance(facts, dict)
    assert facts["resized"] == 12
    build(str(tmp_path / "in"), tmp_path / "again", options)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_second_source_is_the_held_out_split_and_its_copies_leave_training(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", number)
        write(tmp_path / "val" / "ab"[number % 2] / f"{number}.png", number if number < 3 else 50 + number)
    options = replace(OPTIONS, heldout=-1, heldout_source=str(tmp_path / "val"))
    dataset = build(str(tmp_path / "train"), tmp_path / "out", options)
    read = samples(dataset)
    heldout = {sample.picture for name, sample in read if name == "heldout"}
    assert heldout == {path.read_bytes() for path in (tmp_path / "val").rglob("*.png")}
    assert sum(name == "train" for name, _ in read) == 17
    alone = build(str(tmp_path / "train"), tmp_path / "alone", replace(OPTIONS, heldout=0))
    assert list(alone.splits) == ["train"]


def test_a_picture_that_changes_after_the_plan_is_noticed(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / "in" / "a" / f"{number}.png", number)
    plan(str(tmp_path / "in"), tmp_path / "out", OPTIONS)
    for number in range(20):
        write(tmp_path / "in" / "a" / f"{number}.png", 100 + number)
    with pytest.raises(InputError, match="changed since the build was planned"):
        run(tmp_path / "out", 0)
    with pytest.raises(InputError, match=r"an unfinished build from other input or options \(listing differ\)"):
        build(str(tmp_path / "in"), tmp_path / "out", OPTIONS)
    for number in range(20):
        (tmp_path / "in" / "a" / f"{number}.png").unlink()
    with pytest.raises(InputError, match="cannot be read any more"):
        run(tmp_path / "out", 0)


def test_a_repeated_build_writes_nothing_and_another_is_refused(source: Path, whole: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    build(str(source), whole, OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == stamps
    with pytest.raises(InputError, match="holds another data set"):
        build(str(source), whole, replace(OPTIONS, short_side=20))


def test_nothing_foreign_is_overwritten(source: Path, tmp_path: Path) -> None:
    for name in ("train", "CARD.md", "notes"):
        root = tmp_path / name / "out"
        root.mkdir(parents=True)
        mine = root / name / "1.jpg" if name == "train" else root / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(InputError, match="holds other things"):
            build(str(source), root, OPTIONS)
        assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(shard_samples=0), "--shard-samples 0: must be at least 1"),
        (Options(heldout=1.0), "--heldout 1.0: must be a share from 0 to below 1"),
        (Options(short_side=3), "--short-side 3: must be 0 or at least 16"),
        (Options(quality=90), "is for --short-side only"),
        (Options(label_kind="many"), "unknown kind of labels 'many'"),
        (Options(heldout=1e-9), "0 held out; take more, or another --heldout"),
        (Options(vocabulary="/none"), "--vocabulary /none: cannot be read"),
    ],
)
def test_wrong_options_are_refused(source: Path, tmp_path: Path, options: Options, said: str) -> None:
    with pytest.raises(InputError) as refusal:
        build(str(source), tmp_path / "out", options)
    assert said in str(refusal.value)


def test_the_commands(source: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = [str(source), "--shard-samples", "5", "--heldout", "0.2", "--out", out]
    assert data_command(["plan", *words, "--tasks", "3"]) == 0
    said = capsys.readouterr()
    assert "3 tasks, 0 to 2" in said.out
    assert "examined part 1 of 1" in said.err
    with pytest.raises(InputError, match="is planned in 3 tasks already"):
        data_command(["plan", *words, "--tasks", "2"])
    for number in "201":
        assert data_command(["run", out, "--task", number]) == 0
    with pytest.raises(InputError, match="--task 3: must be from 0 to 2"):
        data_command(["run", out, "--task", "3"])
    assert data_command(["merge", out]) == 0
    assert "3 classes, single labels" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(whole)
    assert data_command(["build", *words]) == 0
    assert "4 duplicates removed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build"], "SOURCE is missing"),
        (["build", "x"], "--out DIR is missing"),
        (["build", "x", "y", "--out", "z"], "unexpected 'y'"),
        (["build", "x", "--out", "z", "--out", "y"], "--out is given twice"),
        (["build", "x", "--out", "z", "--worker", "2"], "did you mean '--workers'"),
        (["build", "x", "--out", "z", "--columns", "picture=a"], "must be image=NAME"),
        (["build", "x", "--out", "z", "--heldout", "some"], "must be a share"),
        (["run", "x"], "--task I is missing"),
        (["merge"], "DIR is missing"),
        (["merge", "/nowhere"], "holds no plan"),
        (["adopt", "--out", "x"], "no tars given"),
        (["verify"], "takes one folder"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as refusal:
        data_command(words)
    assert said in str(refusal.value)
