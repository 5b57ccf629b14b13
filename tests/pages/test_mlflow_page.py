"""MLflow's own page in a real browser: lineage, sweep, registry, machines and the comparison over cost.

python -m pytest -m slow tests/pages/test_mlflow_page.py
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from data_pipeline.building import demo
from tests.pages import servers
from tests.pages.browser import Browser
from trainer.tracking.destination import Position

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1800)]


@dataclass
class Page:
    """A server with four runs in it.

    Attributes:
        uri: of the server.
        runs: MLflow's number of each run, by name.
        experiment: theirs.
    """

    uri: str
    runs: dict[str, str]
    experiment: str

    def of(self, name: str, tab: str = "") -> str:
        """The address of a run's page."""
        return f"{self.uri}/#/experiments/{self.experiment}/runs/{self.runs[name]}{tab}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Page]:
    """A pre-training with registered weights, a fine-tuning from it at 64 pixels, and a sweep of two, all trained."""
    folder = tmp_path_factory.mktemp("mlflow")
    data, runs = folder / "digits", folder / "runs"
    demo.digits(data)
    with servers.mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as server:
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        environment["MLFLOW_TRACKING_URI"] = server.uri
        stories = {
            "base": ["--model.resolution", "32", "--tracking.register", "digits"],
            "tuned": ["--model.resolution", "64", "--init.path", str(runs / "base")],
            "lr-1": ["--model.resolution", "32", "--tracking.sweep", "rates", "--optim.lr", "1e-3"],
            "lr-2": ["--model.resolution", "32", "--tracking.sweep", "rates", "--optim.lr", "2e-3"],
        }
        for name, words in stories.items():
            short = ["--optim.steps", "40", "--optim.warmup-steps", "5", "--cluster.ranks", "1", "--parallel.zero", "1"]
            short += ["--tracking.log-every", "5", "--tracking.system-every", "1", "--cluster.price", "0.1"]
            command = [sys.executable, "-m", "trainer.cli", "train", "demo-digits", "--name", name, "--runs", str(runs)]
            command += ["--data.path", str(data), *short, *words]
            done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "did not take everything" not in done.stdout, (runs / name / "logs" / "carry.log").read_text()
        found = {name: str(Position(runs / name, "mlflow").own["run_id"]) for name in stories}
        experiment = MlflowClient(server.uri).get_run(found["base"]).info.experiment_id
        yield Page(server.uri, found, experiment)


def test_lineage_and_sweep_are_one_under_the_other(browser: Browser, page: Page) -> None:
    browser.size(1600, 1200)
    browser.open(f"{page.uri}/#/experiments/{page.experiment}/runs")
    browser.until("base", "rates")
    assert "tuned" not in browser.text.split()  # it lies folded under the run it began from
    assert "lr-1" not in browser.text.split()
    buttons = "[...document.querySelectorAll('button,[role=button]')].filter(one => /Expand/i.test(one.ariaLabel || "
    browser.wait(lambda: browser.run(f"return {buttons}one.title || '')).length"), "buttons that unfold")
    browser.run(f"{buttons}one.title || '')).forEach(one => one.click())")
    browser.until("tuned", "lr-1", "lr-2")
    browser.open(page.of("tuned"))
    browser.until("Parent run", "base")


def test_the_registered_model_leads_back_to_its_run(browser: Browser, page: Page) -> None:
    browser.open(f"{page.uri}/#/models/digits")
    browser.until("digits", "Version 1")
    browser.open(f"{page.uri}/#/models/digits/versions/1")
    text = browser.until("Version 1", "base", "image", "binary", "probability")
    assert "Schema" in text
    browser.open(page.of("base"))
    browser.until("digits", "v1")


def test_a_runs_page_has_figures_data_and_artifacts(browser: Browser, page: Page) -> None:
    browser.open(page.of("base"))
    browser.until("train/loss", "cost/tpu_v3_core_days_flops", "cost/money", "eval/top1", "digits/train", "model.name")
    browser.open(page.of("base", "/system-metrics"))
    browser.until("cpu_utilization_percentage", "system_memory_usage_megabytes", "network_receive_megabytes")
    browser.open(page.of("base", "/artifacts"))
    browser.until("report.html", "model-card.md", "run.json", "events")


def test_runs_are_compared_over_what_they_cost(browser: Browser, page: Page) -> None:
    chosen = [page.runs[name] for name in ("lr-1", "lr-2")]
    words = json.dumps(chosen, separators=(",", ":"))
    browser.open(f"{page.uri}/#/compare-runs?runs={words}&experiments=[%22{page.experiment}%22]")
    text = browser.until("Comparing 2 Runs", "cost/tpu_v3_core_days_flops", "cost/device_hours", "eval/top1", "lr-1")
    client = MlflowClient(page.uri)
    for number in chosen:
        spent = client.get_run(number).data.metrics["cost/tpu_v3_core_days_flops"]
        assert spent > 0
    row = next(line for line in text.splitlines() if line.startswith("cost/tpu_v3_core_days_flops"))
    assert len(row.split()) >= 3  # the name, and a figure of each run
