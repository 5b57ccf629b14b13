"""The road under real faults: stopped, killed, restarted; and refused before it starts where the input is bad."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from trainer import cli

pytestmark = pytest.mark.timeout(600)
STEPS = 24
Train = Callable[..., "subprocess.Popen[str]"]
Refused = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module live."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def words(digits: Path, runs: Path) -> list[str]:
    """A few steps of small digits."""
    words = ["train", "demo-digits", "--data.path", str(digits), "--runs", str(runs), "--model.resolution", "32"]
    words += ["--model.drop-path", "0.1", "--optim.steps", str(STEPS), "--optim.warmup-steps", "4"]
    return [*words, "--checkpoint.every", "8", "--tracking.log-every", "1", "--tracking.no-mlflow"]


@pytest.fixture(scope="module")
def train(words: list[str], repository: Path) -> Train:
    """Starts `coatnet train` on them; more words override."""

    def start(*more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "trainer.cli", *words, *more]
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=repository, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


@pytest.fixture
def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `coatnet train` in this process, for what starts no rank: exit code and what it says."""

    def run(*more: str) -> tuple[int, str]:
        code = cli.main([*words, *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture(scope="module")
def through(train: Train, runs: Path) -> dict[int, tuple[float, float]]:
    """Losses and norms of a run that nothing disturbed."""
    code, said = finish(train("--name", "through"))
    assert code == 0, said
    return losses(runs / "through")


def rewound(runs: Path, name: str, *deleted: int) -> Path:
    """A copy of the undisturbed run, unfinished, without the checkpoints after the steps in `deleted`."""
    shutil.copytree(runs / "through", runs / name)
    (runs / name / "done").unlink()
    for step in deleted:
        shutil.rmtree(runs / name / "checkpoints" / f"step-{step:08d}")
    return runs / name


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Step to (loss, gradient norm); of a step that was repeated, the last."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row}


def wait_for(there: Callable[[], bool], process: "subprocess.Popen[str]", what: str) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


def rank_of(process: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    """The rank of that number that the command started last."""
    family = psutil.Process(process.pid).children(recursive=True)
    found = [
        child for child in family if child.environ().get("RANK") == str(rank) and "trainer.train" in child.cmdline()
    ]
    return max(found, key=lambda child: float(child.create_time()))


def wait_for_step(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    def there() -> bool:
        return (folder / "metrics.jsonl").exists() and any(done >= step for done in losses(folder))

    wait_for(there, process, f"step {step}")


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def test_undisturbed_run_learns(through: dict[int, tuple[float, float]]) -> None:
    assert list(through) == list(range(1, STEPS + 1))
    assert through[STEPS][0] < through[1][0]


def test_stopped_run_continues_bitwise(
    train: Train, told: Refused, runs: Path, through: dict[int, tuple[float, float]]
) -> None:
    """Nobody else trains in its folder, neither the same run now, nor another one later; loaders change nothing."""
    stopped = train("--name", "stopped", "--data.workers", "1")
    wait_for_step(runs / "stopped", 6, stopped)
    code, said = told("--name", "stopped")
    assert (code, "another process trains here" in said) == (76, True), said
    stopped.send_signal(signal.SIGINT)
    code, said = finish(stopped)
    assert code == 75, said
    assert "the same command continues" in said
    last = max(losses(runs / "stopped"))
    assert last < STEPS
    assert (runs / "stopped" / "checkpoints" / f"step-{last:08d}" / "COMPLETE").exists()
    code, said = told("--name", "stopped", "--optim.lr", "0.5")
    assert code == 76
    assert re.search(r"belongs to another run: optim.lr was 0\.\d+, is 0\.5", said)
    assert finish(train("--name", "stopped", "--data.workers", "1"))[0] == 0
    assert losses(runs / "stopped") == through
    code, said = told("--name", "stopped")  # finished: says so and does nothing
    assert (code, "is finished" in said) == (0, True)


def test_killed_rank_ends_all_and_the_run_continues_bitwise_from_the_newest_whole_checkpoint(
    train: Train, runs: Path, through: dict[int, tuple[float, float]]
) -> None:
    folder = rewound(runs, "killed", 16, STEPS)
    (folder / "metrics.jsonl").unlink()
    newest = folder / "checkpoints" / "step-00000016"
    killed = train("--name", "killed", "--restarts", "0")
    wait_for_step(folder, 12, killed)
    wait_for(lambda: (newest / "COMPLETE").exists(), killed, "a save")
    family = psutil.Process(killed.pid).children(recursive=True)
    began = time.monotonic()
    rank_of(killed, 1).send_signal(signal.SIGKILL)
    code, said = finish(killed)
    assert time.monotonic() - began < 60  # the promise itself: a clear message within a minute
    assert code == 137
    for word in ("rank 1", "SIGKILL", "last save is step-00000016"):
        assert word in said
    alive = psutil.wait_procs(family, timeout=30)[1]
    assert all(left.status() == psutil.STATUS_ZOMBIE for left in alive), alive
    data = bytearray((newest / "rank-00001.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "rank-00001.safetensors").write_bytes(data)
    code, said = finish(train("--name", "killed"))
    assert code == 0, said
    assert f"passed over {newest}" in said
    assert "sha256" in said
    assert losses(folder) == {step: found for step, found in through.items() if step > 8}
    events = [json.loads(line) for line in (folder / "events" / "rank-00000.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [8, 8]


def test_a_run_goes_on_by_itself_after_its_ranks_crashed(
    train: Train, runs: Path, through: dict[int, tuple[float, float]]
) -> None:
    """One rank is killed, then in the next try the other; losses stay bitwise those of the undisturbed run."""
    folder = rewound(runs, "recovers", 16, STEPS)
    (folder / "metrics.jsonl").unlink()
    process = train("--name", "recovers")
    for rank, step in ((1, 12), (0, 20)):
        wait_for_step(folder, step, process)
        rank_of(process, rank).send_signal(signal.SIGKILL)
    code, said = finish(process)
    assert code == 0, said
    assert said.count("was killed by SIGKILL") == said.count("without progress") == 2
    assert losses(folder) == {step: found for step, found in through.items() if step > 8}
    events = [json.loads(line) for line in (folder / "events" / "rank-00000.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"][-3:] == [8, 8, 16]
    book = json.loads((folder / "events" / "clock.jsonl").read_text().splitlines()[-1])
    assert sum(book["spent"].values()) == book["until"] - book["began"]
    assert book["attempts"] == 4  # the copied run's own, and three tries
    assert 0 < book["spent"]["down"] < book["until"] - book["began"]


def test_other_world_and_stage_go_on_within_rounding(
    train: Train, runs: Path, through: dict[int, tuple[float, float]]
) -> None:
    folder = rewound(runs, "elastic", STEPS)
    words = ("--name", "elastic", "--cluster.ranks", "1", "--parallel.zero", "1", "--parallel.micro-batch", "32")
    code, said = finish(train(*words))
    assert code == 0, said
    for step, (loss, _) in losses(folder).items():
        assert loss == pytest.approx(through[step][0], abs=1e-3)


BAD = {
    "no data": (["--data.path", "nowhere"], ["nowhere", "coatnet data demo"]),
    "resolution": (["--model.resolution", "100"], ["model.resolution = 100", "multiple of 32", "nearest valid: 96"]),
    "world": (["--cluster.ranks", "3"], ["data.global_batch = 64", "3 ranks do not divide it"]),
    "field": (["--optim.lrr", "1"], ["optim.lr", "did you mean"]),
    "model": (["--model.name", "coatnet9"], ["coatnet9", "did you mean"]),
    "batch": (["--data.global-batch", "8192"], ["data.global_batch = 8192", "nearest valid"]),
    "group": (["--norm.replica-batch", "24"], ["norm.replica_batch = 24", "nearest valid"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_starts(what: str, told: Refused, runs: Path) -> None:
    words, expected = BAD[what]
    code, said = told("--name", "bad", *words)
    assert code == 76, said
    for word in expected:
        assert word in said
    assert not (runs / "bad").exists()


def test_the_process_ends_with_the_code_too(train: Train) -> None:
    code, said = finish(train("--name", "bad", "--optim.lrr", "1"))
    assert code == 76
    assert "Traceback" not in said


def test_port_in_use_is_refused(told: Refused, runs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = told("--name", "bad", "--cluster.master-port", str(taken.getsockname()[1]))
    assert code == 76
    assert "in use by another program" in said
    assert not (runs / "bad").exists()


@pytest.mark.parametrize("damage", ["manifest.json", "train.parquet"])
def test_corrupt_manifest_is_refused(damage: str, told: Refused, digits: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "copy")
    content = (tmp_path / "copy" / damage).read_bytes()
    (tmp_path / "copy" / damage).write_bytes(content[: len(content) // 2])
    code, said = told("--name", "bad", "--data.path", str(tmp_path / "copy"))
    assert code == 76, said
    assert damage in said
    assert not (runs / "bad").exists()
