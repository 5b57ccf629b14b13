"""The run's lines reach a real MLflow store, once, in one MLflow run."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from configs import resolve
from trainer.track import MlflowProcess, RunLog, tracking_uri


@pytest.mark.timeout(300)
def test_lines_are_carried_once_and_the_run_goes_on(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = replace(resolve.load("demo-digits"), runs=str(tmp_path), name="mine")
    folder = tmp_path / "mine"
    (folder / "logs").mkdir(parents=True)
    (folder / "run.json").write_text(resolve.to_json(run))

    first = MlflowProcess(run, folder)
    log = RunLog(folder)
    for step in (1, 2, 3):
        log.metrics(step, {"train/loss": 1.0 / step, "perf/mfu": 0.5})
    assert first.close() is None
    log.metrics(4, {"train/loss": 0.25})
    log.close()
    with (folder / "metrics.jsonl").open("a") as half:
        half.write('{"step": 5, "ti')  # a line that is still being written is left for later
    (folder / "done").write_text("4\n")
    command = [sys.executable, "-m", "trainer.mlflow_writer", str(folder)]
    subprocess.run(command, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}, check=True)

    client = MlflowClient(tracking_uri=tracking_uri(run))
    experiment = client.get_experiment_by_name("coatnet")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "mine"
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert found.data.params["optim.lr"] == str(run.optim.lr)
    assert "run.json" in [artifact.path for artifact in client.list_artifacts(found.info.run_id)]


def test_dead_server_is_reported_and_nothing_is_lost(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    plain = resolve.load("demo-digits")
    run = replace(plain, runs=str(tmp_path), tracking=replace(plain.tracking, uri="http://127.0.0.1:9"))
    folder = tmp_path / "demo-digits"
    (folder / "logs").mkdir(parents=True)
    (folder / "run.json").write_text(resolve.to_json(run))
    process = MlflowProcess(run, folder)
    log = RunLog(folder)
    log.metrics(1, {"train/loss": 1.0})
    log.close()
    problem = process.close()
    assert problem is not None
    assert "metrics.jsonl has all of it" in problem
    assert (folder / "metrics.jsonl").read_text().count("train/loss") == 1


def test_tracking_uri_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = replace(resolve.load("demo-digits"), runs=str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(plain) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(plain) == "http://tracking:5000"
    assert tracking_uri(replace(plain, tracking=replace(plain.tracking, uri="sqlite:///x.db"))) == "sqlite:///x.db"
