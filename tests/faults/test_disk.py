"""Real training on disks that fail: saves are lost and told of, the run goes on and ends as if nothing had been."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults import disks
from trainer.state import checkpoint, retention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(disks.impossible()), reason=f"NOT RUN: {disks.impossible()}"),
]
STEPS = 60
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module live, each in a folder of its own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def start(digits: Path, repository: Path) -> Start:
    """Starts `coatnet train`, which saves every third step."""

    def train(runs: Path, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "trainer.cli", "train", "demo-digits", "--data.path", str(digits)]
        command += ["--runs", str(runs), "--name", "run", "--model.resolution", "32", "--data.workers", "1"]
        command += ["--optim.steps", str(STEPS), "--optim.warmup-steps", "4", "--checkpoint.every", "3"]
        command += ["--tracking.log-every", "1", "--tracking.no-mlflow", "--checkpoint.keep", "2", *words]
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=repository, env=environment, stdout=pipe, stderr=pipe, text=True)

    return train


@pytest.fixture(scope="module")
def through(start: Start, home: Path) -> dict[int, tuple[float, float]]:
    """Losses and norms of a run on a good disk."""
    finish(start(home / "through"))
    return losses(home / "through" / "run")


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return out + err


def rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and norm of every step, each of which is written down once."""
    found = [row for row in rows(run / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in found}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(run / "events" / "rank-00000.jsonl") if row["event"] == kind]


def until(there: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def whole(run: Path) -> list[int]:
    """Steps of the checkpoints that verify."""
    found = retention.found(run / "checkpoints")
    return [retention.step_of(path) for path in found if not checkpoint.damage(path)]


def cpu_seconds(process: "subprocess.Popen[str]") -> float:
    """Seconds that the command and its ranks have computed."""
    family = psutil.Process(process.pid)
    return sum(sum(one.cpu_times()[:2]) for one in [family, *family.children(recursive=True)])


def test_a_disk_that_is_full_for_a_while(start: Start, home: Path, through: dict[int, tuple[float, float]]) -> None:
    """Not one byte is left, for the log neither; nothing is lost but the saves of that time."""
    with disks.small(home / "full", 40):
        process, run = start(home / "full"), home / "full" / "run"
        until(lambda: len(whole(run)) >= 2, process)
        ballast = disks.stuff(home / "full")
        before, computed = whole(run), cpu_seconds(process)
        until(lambda: cpu_seconds(process) > computed + 15, process)  # it goes on, for more than one save
        assert max(whole(run)) >= max(before)
        ballast.unlink()
        said = finish(process)
        assert losses(run) == through
        lost = [row["of_step"] for row in events(run, "save_failed")]
        assert lost, said
        assert all("No space left" in row["reason"] for row in events(run, "save_failed"))
        assert f"NOT SAVED at step {lost[0]}" in said
        assert whole(run)[0] == STEPS
        assert not list((run / "checkpoints").glob("*.partial"))


def test_low_room_is_told_before_it_is_needed(start: Start, home: Path) -> None:
    """Three checkpoints of 4.7 MB fit beside the rest; five would have to."""
    with disks.small(home / "low", 17):
        said = finish(start(home / "low", "--checkpoint.keep", "4", "--checkpoint.every", "20"))
        warned = [row["step"] for row in events(home / "low" / "run", "warning") if "low disk" in row["text"]]
    assert warned[0] == 0  # before the first save
    assert "free some, or lower checkpoint.keep" in said


def test_a_folder_that_may_not_be_written_for_a_while(
    start: Start, home: Path, through: dict[int, tuple[float, float]]
) -> None:
    process, run = start(home / "read-only"), home / "read-only" / "run"
    until(lambda: whole(run), process)
    with disks.read_only(run / "checkpoints"):
        until(lambda: len(events(run, "save_failed")) >= 2, process)
        assert whole(run)
    finish(process)
    assert losses(run) == through
    assert all("Read-only file system" in row["reason"] for row in events(run, "save_failed"))
    assert whole(run)[0] == STEPS


@pytest.mark.skipif(not disks.GROUPS.is_dir(), reason="NOT RUN: no blkio control groups here to slow a disk down with")
@pytest.mark.parametrize("overlap", ["wait", "skip"])
def test_a_slow_disk(overlap: str, start: Start, home: Path, through: dict[int, tuple[float, float]]) -> None:
    """Two megabytes a second: training goes on while a checkpoint is written; the next waits, or is left out."""
    run = home / f"slow-{overlap}" / "run"
    with disks.disk(home / f"disk-{overlap}") as disk:
        (run / "checkpoints").parent.mkdir(parents=True)
        (run / "checkpoints").symlink_to(disk.path)
        with disks.slow(disk.device, 2_000_000) as members:
            process = start(run.parent, "--checkpoint.overlap", overlap)
            members.write_text(str(process.pid))  # before it starts its ranks, which inherit it
            finish(process)
        assert whole(run)[0] == STEPS
        assert losses(run) == through
        saves, left_out = events(run, "save"), events(run, "save_failed")
        behind = [row for row in saves if row["write"]]
        assert behind, "no save in the background"
        if overlap == "skip":
            assert left_out
            assert all("left out" in row["reason"] for row in left_out)
            assert max(row["stall"] for row in behind) < min(row["write"] for row in behind) / 5
        else:
            assert not left_out
        shutil.copytree(run / "events", home / f"events-{overlap}")
