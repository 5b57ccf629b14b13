"""The command line as a user meets it: real processes, exit codes, messages, JSON."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.resolve import diff, from_json, load, names, to_json
from data_pipeline.building import demo
from trainer.commands.config import resolve_command
from trainer.commands.train import refuse_another_run, train_command


def coatnet(root: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `coatnet WORDS` of the tree at `root`."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "trainer.cli", *words]
    return subprocess.run(command, cwd=cwd or root, env=environment, capture_output=True, text=True, check=False)


def test_overrides_are_parsed_by_type() -> None:
    words = ["--optim.lr", "8e-4", "--parallel.micro_batch", "2", "--augment.flip", "--data.max-pixels=2048"]
    run = resolve_command("demo-digits", [*words, "--optim.betas", "0.8", "0.9", "--parallel.zero", "1", "--name", "x"])
    assert diff(load("demo-digits"), run) == [
        ("name", "", "x"),
        ("data.max_pixels", 100_000_000, 2048),
        ("augment.flip", False, True),
        ("optim.lr", load("demo-digits").optim.lr, 8e-4),
        ("optim.betas", (0.9, 0.999), (0.8, 0.9)),
        ("parallel.zero", 3, 1),
        ("parallel.micro_batch", 0, 2),
    ]
    assert not resolve_command("coatnet0-in1k-224", ["--augment.no-flip"]).augment.flip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], "unknown field 'optim.lrr'; did you mean 'optim.lr'"),
        (["--augment.no-flp"], "did you mean 'augment.flip'"),
        (["--optim.no-lr"], "unknown field 'optim.no_lr'"),
        (["--optim.lr", "fast"], "optim.lr = 'fast': must be a number"),
        (["--data.workers", "1.5"], "data.workers = '1.5': must be a whole number"),
        (["--optim.lr", "-1"], "optim.lr = -1.0: must be positive; nearest valid: 0.001"),
        (["--optim.lr", "inf"], "must be a finite number"),
        (["--parallel.zero", "7"], "parallel.zero = 7: must be one of 0, 1, 2, 3; nearest valid: 3"),
        (["--augment.crop=randm"], "nearest valid: 'random'"),
        (["--model.resolution", "100"], "nearest valid: 96"),
        (["--model.name", "coatnet9"], "unknown model 'coatnet9'; did you mean 'coatnet"),
        (["--augment.crop-scale", "0.5"], "Expected 2 values"),
        (["--parallel.zero"], "Expected 1 values"),
        (["stray"], "stray"),
        (["--recipe", "x"], "the recipe is the word after the command"),
        (["--optim.steps", "5"], "optim.warmup_steps"),
    ],
)
def test_bad_overrides_are_refused_in_our_words(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_command("demo-digits", words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["config", "show", "demo-digitz"], 76, "did you mean 'demo-digits'"),
        (["config", "show", "demo-digits", "--optim.lrr", "1"], 76, "did you mean 'optim.lr'"),
        (["config", "show"], 76, "needs a recipe"),
        (["config", "shwo"], 76, "did you mean 'show'"),
        (["config", "diff", "demo-digits"], 76, "required: b"),
        (["modles"], 76, "did you mean 'models'"),
        (["models", "--resolution", "300"], 76, "nearest valid: 224"),
        (["models", "--resolution", "big"], 76, "invalid int value"),
        (["models", "--stride", "depthwize"], 76, "did you mean 'depthwise'"),
        (["models", "--jsn"], 76, "did you mean '--json'"),
    ],
)
def test_faults_end_with_76_and_one_message(repository: Path, words: list[str], code: int, message: str) -> None:
    done = coatnet(repository, *words)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_closed_pipe_is_met_without_a_traceback(repository: Path, buffering: str) -> None:
    command = [sys.executable, "-m", "trainer.cli", "models"]
    environment = os.environ | {"PYTHONUNBUFFERED": buffering}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=repository, env=environment, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_names_every_command_and_version_is_ours(repository: Path) -> None:
    for words in ([], ["--help"]):
        done = coatnet(repository, *words)
        assert done.returncode == 0
        assert all(f"coatnet {word} " in done.stdout for word in ("models", "config", "train", "eval", "data"))
    assert coatnet(repository, "--version").stdout.startswith("coatnet ")


def test_help_of_overrides_lists_fields_with_the_recipes_values(repository: Path) -> None:
    done = coatnet(repository, "config", "show", "coatnet7-jft3b-224", "--help")
    assert done.returncode == 0
    assert "--parallel.micro-batch" in done.stdout
    assert "coatnet7" in done.stdout


def test_show_json_is_the_run(repository: Path, tmp_path: Path) -> None:
    done = coatnet(repository, "config", "show", "demo-digits", "--seed", "5", "--json")
    run = from_json(done.stdout)
    assert diff(load("demo-digits"), run) == [("seed", 0, 5)]
    path = tmp_path / "run.json"
    path.write_text(done.stdout)
    rows = json.loads(coatnet(repository, "config", "diff", "demo-digits", str(path), "--json").stdout)
    assert rows == [{"field": "seed", "a": 0, "b": 5}]
    assert coatnet(repository, "config", "diff", "demo-digits", str(path)).stdout.split() == ["seed", "0", "->", "5"]


def test_list_names_every_recipe(repository: Path) -> None:
    rows = json.loads(coatnet(repository, "config", "list", "--json").stdout)
    assert [row["name"] for row in rows] == names()
    assert all(row["summary"].endswith(".") for row in rows)


def test_models_prints_the_paper_beside_ours(repository: Path) -> None:
    rows = {row["name"]: row for row in json.loads(coatnet(repository, "models", "--json").stdout)}
    assert rows["coatnet7"]["parameters"] == 2_441_973_112
    assert rows["coatnet0"]["published_multiply_adds"] == 4.2e9
    lines = coatnet(repository, "models").stdout.splitlines()
    (line,) = (line for line in lines if line.startswith("coatnet3 "))
    assert line.split() == [
        "coatnet3",
        "expansion",
        "166,966,648",
        "168.0M",
        "-0.6%",
        "34,372,257,792",
        "34.7G",
        "-0.9%",
    ]


@pytest.mark.parametrize("words", [["models"], ["config", "show", "demo-digits"], ["--help"], ["--version"]])
def test_quick_commands_leave_torch_out(repository: Path, words: list[str]) -> None:
    code = f"import sys; from trainer.cli import main; assert main({words!r}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_foreign_package_of_a_rooms_name_is_named(repository: Path, tmp_path: Path) -> None:
    shadow = tmp_path / "slurm"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{repository}"}
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from trainer.cli import main; sys.exit(main(['--help']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 76
    assert f"package 'slurm' must lie in {repository}" in done.stderr
    assert str(shadow) in done.stderr


def test_a_room_that_is_missing_is_named(repository: Path, tmp_path: Path) -> None:
    for room in ("configs", "models", "trainer", "slurm"):
        shutil.copytree(repository / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data_pipeline").mkdir()
    command = [sys.executable, "-S", "-m", "trainer.cli", "--help"]  # -S: without the installed package
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 76
    assert "package 'data_pipeline' must lie in" in done.stderr


MADE_UP = ["demo-digits", "--data.synthetic", "--tracking.no-mlflow", "--cluster.device", "cpu", "--cluster.ranks", "2"]
MIXED = ["--augment.mixup-alpha", "0.2", "--data.global-batch", "30", "--norm.replica-batch", "15"]
OUTSIDE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def refusal(tmp_path: Path, *words: str) -> str:
    """What `coatnet train` on made-up pictures says against `words`; it must leave no run folder behind."""
    with pytest.raises(InputError) as caught:
        train_command([*MADE_UP, "--runs", str(tmp_path / "runs"), *words])
    assert not (tmp_path / "runs").is_dir()
    return str(caught.value)


def test_odd_micro_batches_that_part_pairs_are_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, *MIXED)
    assert "parallel.micro_batch = 15: mixup and cutmix pair neighbours" in said


def test_runs_below_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    assert refusal(tmp_path).startswith(
        f"runs = '{tmp_path / 'runs'}': {tmp_path / 'runs'}/demo-digits-synthetic cannot"
    )


def test_data_without_a_held_out_split_are_refused(tmp_path: Path) -> None:
    demo.digits(tmp_path / "digits")
    manifest = tmp_path / "digits" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["splits"]["heldout"]
    manifest.write_text(json.dumps(content))
    said = refusal(tmp_path, "--data.no-synthetic", "--data.path", str(tmp_path / "digits"))
    assert "has no split 'heldout', only train" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "not set: WORLD_SIZE, MASTER_PORT"),
        ({"MASTER_ADDR": None}, "not set: MASTER_ADDR"),
        ({"RANK": ""}, "not set: RANK"),
        ({"WORLD_SIZE": "two"}, "not a number: WORLD_SIZE"),
        ({"RANK": "2"}, "RANK = 2: must be below WORLD_SIZE = 2"),
    ],
)
def test_half_an_outside_launcher_is_refused(
    changes: dict[str, str | None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**OUTSIDE, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    said = refusal(tmp_path)
    assert message in said
    if "below" not in message:
        assert all(name in said for name in OUTSIDE)


def test_under_an_outside_launcher_the_first_rank_takes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OUTSIDE.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "runs" / "demo-digits-synthetic"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process trains here"):
            train_command([*MADE_UP, "--runs", str(tmp_path / "runs")])


def test_a_folder_of_an_older_release_is_continued_and_a_damaged_one_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load("demo-digits")
    document = json.loads(to_json(run))
    del document["optim"]["ema"]
    (tmp_path / "run.json").write_text(json.dumps(document))
    refuse_another_run(tmp_path, run)
    assert "at their defaults: optim.ema" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: .*cannot be read"):
        refuse_another_run(tmp_path, run)
