"""A training run whose MLflow server dies, comes back, and whose disk is full for a while: no figure is lost.

python -m pytest -m slow tests/pages/test_mlflow_server.py
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from data_pipeline.building import demo
from tests.pages import servers
from tests.pages.servers import MlflowServer, wait
from trainer.tracking.destination import Position

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 2000


@dataclass
class Store:
    """A server with a database behind it.

    Attributes:
        server: MLflow's.
        fill: lets the database refuse every change, or take them again.
    """

    server: MlflowServer
    fill: Callable[[bool], None]


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """MLflow's server with each of the databases that its users have."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            server = stack.enter_context(servers.mlflow_server(tmp_path, f"sqlite:///{tmp_path}/mlflow.db"))
            yield Store(server, server.fill_disk)
            return
        obstacle = servers.postgres_obstacle()
        if obstacle:
            pytest.skip(f"NO POSTGRESQL, THAT BACK END WAS NOT TESTED: {obstacle}")
        database = stack.enter_context(servers.postgres(tmp_path / "postgres"))
        yield Store(stack.enter_context(servers.mlflow_server(tmp_path, database.uri)), database.refuse)


def start(runs: Path, data: Path, uri: str, repository: Path) -> "subprocess.Popen[str]":
    """A training of small digits that lasts a minute or more."""
    words = ["train", "demo-digits", "--data.path", str(data), "--runs", str(runs), "--name", "outlived"]
    words += ["--model.resolution", "32", "--optim.steps", str(STEPS), "--optim.warmup-steps", "20"]
    words += [
        "--cluster.ranks",
        "1",
        "--parallel.zero",
        "1",
        "--parallel.recompute",
        "none",
        "--checkpoint.every",
        "500",
    ]
    words += ["--tracking.log-every", "5", "--tracking.system-every", "1", "--cluster.price", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": uri}
    log = (runs / "train.log").open("w")
    return subprocess.Popen([sys.executable, "-m", "trainer.cli", *words], cwd=repository, env=environment, stdout=log,
                            stderr=log, text=True)  # fmt: skip


def written(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    rows = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(row) for row in rows]


def test_no_figure_is_lost_whatever_happens_to_the_server(store: Store, tmp_path: Path, repository: Path) -> None:
    runs, data = tmp_path / "runs", tmp_path / "digits"
    runs.mkdir()
    demo.digits(data)
    folder = runs / "outlived"
    training = start(runs, data, store.server.uri, repository)
    try:
        wait(lambda: carried(folder) > 5, "the first lines in MLflow")
        store.server.kill()
        here = len(written(folder))
        wait(lambda: len(written(folder)) > here + 30, "steps while the server is away")
        assert training.poll() is None
        gone = carried(folder)
        store.server.start()
        wait(lambda: carried(folder) > gone, "lines after the server is back")
        assert training.poll() is None, "the run was too short to see the server come back"
        store.fill(True)
        time.sleep(3)
        full = carried(folder)
        wait(lambda: len(written(folder)) > full + 30 or training.poll() is not None, "steps while the disk is full")
        store.fill(False)
        assert training.wait(timeout=900) == 0, (runs / "train.log").read_text()
    finally:
        training.kill()
    assert "did not take everything" not in (runs / "train.log").read_text()
    check(folder, store.server.uri)


def carried(folder: Path) -> int:
    """Lines that are in MLflow for good."""
    return Position(folder, "mlflow").mark.lines


def check(folder: Path, uri: str) -> None:
    """Every point of every line is in MLflow, once, and nothing else is."""
    client = MlflowClient(uri)
    run_id = Position(folder, "mlflow").own["run_id"]
    expected: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in written(folder):
        for key in row.keys() - {"step", "time"}:
            expected[key].append((row["step"], row[key]))
    (file,) = (folder / "system").glob("*.jsonl")
    for text in file.read_text().splitlines():
        row = json.loads(text)
        for key in row.keys() - {"step", "time"}:
            expected[f"system/{file.stem}/{key}"].append((row["step"], row[key]))
    assert sum(map(len, expected.values())) > 10 * STEPS / 5
    for key, points in expected.items():
        found = [(one.step, one.value) for one in client.get_metric_history(run_id, key)]
        assert sorted(found) == sorted(points), key
    run = client.get_run(run_id)
    assert run.data.metrics.keys() == expected.keys()
    assert run.info.status == "FINISHED"
    assert {"report.html", "model-card.md", "run.json"} <= {one.path for one in client.list_artifacts(run_id)}
    assert not (folder / "carried" / "mlflow-refused.jsonl").exists()
    said = (folder / "logs" / "carry.log").read_text()
    assert said.count("mlflow: will be tried again") >= 1
