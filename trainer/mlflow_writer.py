"""Carries a run folder's lines into MLflow: `python -m trainer.mlflow_writer RUN [--follow]`.

`mlflow.json` in the run folder keeps the MLflow run's id and how much was carried, so that a resumed training goes on
in the same MLflow run and a killed writer goes on where it stopped.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from configs import resolve
from configs.schema import Run
from trainer.track import tracking_uri

POLL = 2.0  # seconds between two looks at the files


class Writer:
    """One run folder and the MLflow run it goes to."""

    def __init__(self, folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.folder = folder
        self.run: Run = resolve.from_json((folder / "run.json").read_text())
        self.uri = tracking_uri(self.run)
        self._state_file = folder / "mlflow.json"
        self._state: dict[str, Any] = {"offset": 0}
        if self._state_file.exists():
            self._state = json.loads(self._state_file.read_text())
        self._client = MlflowClient(tracking_uri=self.uri)
        if "run_id" in self._state:
            self._client.update_run(self._state["run_id"], status="RUNNING")
        else:
            self._create()

    def _create(self) -> None:
        """Make the MLflow run, with its parameters, tags and first artifacts."""
        client, name = self._client, self.run.tracking.experiment
        found = client.get_experiment_by_name(name)
        if found is not None:
            experiment = found.experiment_id
        else:
            local = self.uri.startswith("sqlite:")
            artifacts = (Path(self.run.runs).resolve() / "mlartifacts").as_uri() if local else None
            experiment = client.create_experiment(name, artifact_location=artifacts)
        tags = {"recipe": self.run.recipe, "config": resolve.digest(self.run), "run_folder": str(self.folder.resolve())}
        made = client.create_run(experiment, run_name=self.folder.name, tags=tags)
        self._state["run_id"] = made.info.run_id
        self._save()
        for key, value in resolve.flat(self.run).items():
            client.log_param(made.info.run_id, key, value)

    def _save(self) -> None:
        aside = self._state_file.with_suffix(".tmp")
        aside.write_text(json.dumps(self._state))
        os.replace(aside, self._state_file)

    def carry(self) -> None:
        """Send the whole lines of metrics.jsonl that were not sent yet."""
        from mlflow.entities import Metric

        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as lines:
            lines.seek(self._state["offset"])
            batch = lines.read()
        whole = batch[: batch.rfind(b"\n") + 1]
        metrics = []
        for line in whole.splitlines():
            row = json.loads(line)
            step, moment = row.pop("step"), int(row.pop("time") * 1000)
            metrics += [Metric(key, value, moment, step) for key, value in row.items()]
        for first in range(0, len(metrics), 1000):  # MLflow's limit for one call
            self._client.log_batch(self._state["run_id"], metrics=metrics[first : first + 1000])
        self._state["offset"] += len(whole)
        self._save()

    def finish(self) -> None:
        """Send the rest and the run's small files; close the MLflow run when the training is finished."""
        self.carry()
        for name in ("run.json", "deepspeed.json", "environment.json", "evaluation.json"):
            if (self.folder / name).exists():
                self._client.log_artifact(self._state["run_id"], str(self.folder / name))
        done = (self.folder / "done").exists()
        self._client.set_terminated(self._state["run_id"], status="FINISHED" if done else "KILLED")


def main(arguments: list[str]) -> int:
    """Carry once, or with --follow until standard input ends, which it does when the run ends, however it ends."""
    os.nice(10)  # the training comes first
    folder, follow = Path(arguments[0]), "--follow" in arguments[1:]
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    if follow:
        threading.Thread(target=wait_for_the_end, daemon=True).start()
    writer = Writer(folder)
    while follow and not ended.wait(POLL):
        writer.carry()
    writer.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
