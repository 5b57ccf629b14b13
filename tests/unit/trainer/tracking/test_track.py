"""The run's own lines, where MLflow is, and what a run may name as destinations."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs import resolve
from configs.errors import InputError
from trainer.tracking.track import RunLog, check_sinks, tracking_uri, wanted


def test_tracking_uri_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = replace(resolve.load("demo-digits"), runs=str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(plain) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(plain) == "http://tracking:5000"
    assert tracking_uri(replace(plain, tracking=replace(plain.tracking, uri="sqlite:///x.db"))) == "sqlite:///x.db"


@pytest.mark.parametrize("torn", ["", '{"step": 2, "ti'])
def test_a_line_torn_by_a_crash_is_cut_off(tmp_path: Path, torn: str) -> None:
    first = RunLog(tmp_path)
    first.metrics(1, {"train/loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    second = RunLog(tmp_path)
    second.metrics(2, {"train/loss": 0.5})
    second.event("done", step=2)
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 0.5)]
    (event,) = (tmp_path / "events" / "rank-00000.jsonl").read_text().splitlines()
    assert json.loads(event)["event"] == "done"


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = RunLog(tmp_path)
    try:
        for step in range(1, 9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (150 if step < 8 else before[0], before[1]))
            log.metrics(step, {"train/loss": 1.0 / step})
            log.event("save", step=step)
            if step == 7:
                written = (tmp_path / "metrics.jsonl").read_bytes()
                assert len(written) == 150
                assert not written.endswith(b"\n")  # the last line is there in part
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert log.close() == []
    for name in ("metrics.jsonl", "events/rank-00000.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 9))


def test_lines_that_are_lost_at_the_end_are_told(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        log.metrics(1, {"train/loss": 1.0})
        (told,) = log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert "metrics.jsonl: 1 lines could not be written: [Errno 27]" in told


def test_sinks_that_are_installed_are_accepted() -> None:
    plain = resolve.load("demo-digits")
    run = replace(plain, tracking=replace(plain.tracking, tensorboard=True, wandb=True))
    assert wanted(run) == ["mlflow", "tensorboard", "wandb"]
    check_sinks(run)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_extra_is_refused_by_name(name: str, folder: bool, tmp_path: Path, repository: Path) -> None:
    """In a Python without site-packages, also where a folder of the package's name lies about."""
    if folder:
        (tmp_path / name).mkdir()
    code = (
        "from dataclasses import replace\n"
        "from configs import resolve\n"
        "from trainer.tracking.track import check_sinks\n"
        "run = resolve.load('demo-digits')\n"
        f"check_sinks(replace(run, tracking=replace(run.tracking, mlflow=False, {name}=True)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"tracking.{name} = True: the package {name} is not installed; pip install {name}" in done.stderr
    assert InputError.__name__ in done.stderr
