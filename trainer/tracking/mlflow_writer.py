"""A run's figures in MLflow: one MLflow run for the whole life of a run folder, however often it is resumed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.schema import Run
from trainer.tracking import mlflow_run
from trainer.tracking.destination import Line, Mark, Position
from trainer.tracking.track import tracking_uri

METRICS_A_CALL, TAGS_A_CALL = 1000, 100  # MLflow's limits
ARTIFACTS = ("run.json", "deepspeed.json", "environment.json", "data.json", "evaluation.json", "examples.json",
             "report.html", "model-card.md", "data-card.md", "bad-samples.jsonl")  # fmt: skip
REFUSED = "mlflow-refused.jsonl"  # in the folder of positions: points that MLflow will never take


class MlflowWriter:
    """One run folder's MLflow run. Lines sent again after a kill are the same points: the store keeps them once."""

    def __init__(self, folder: Path, run: Run, position: Position) -> None:
        from mlflow.tracking import MlflowClient

        self._folder, self._run, self._position = folder, run, position
        self._uri = tracking_uri(run)
        self._client = MlflowClient(tracking_uri=self._uri)
        self._continue()
        if "run_id" not in position.own:
            self._create()
        self.start = position.mark
        if not position.own.get("described"):
            mlflow_run.log_parameters(self._client, self._run_id, run)
            mlflow_run.log_data(self._client, self._run_id, folder)
            mlflow_run.log_origin(self._client, self._run_id, run)
            position.save(position.mark, described=True)
        else:
            self._tag(mlflow_run.changed(self._client, self._run_id, run))
        self._tag(mlflow_run.tags(folder, run))

    @property
    def _run_id(self) -> str:
        """The MLflow run."""
        return str(self._position.own["run_id"])

    def _continue(self) -> None:
        """Go on with the run of this folder, if this store has it.

        Raises:
            RuntimeError: somebody deleted it there, which is not to be undone by a program.
        """
        if "run_id" not in self._position.own:
            return
        found = mlflow_run.exists(self._client, self._run_id) or self._exchanged()
        if found is None:
            return
        self._require_kept(found)
        self._client.update_run(self._run_id, status="RUNNING")

    def _require_kept(self, found: Any) -> None:
        """Refuse an MLflow run that is deleted.

        Raises:
            RuntimeError: it is.
        """
        if found.info.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"MLflow run {self._run_id} was deleted: restore it there, then say `coatnet track sync "
                f"{self._folder}`; or delete {self._folder}/carried/mlflow.json to log the run anew"
            )

    def _exchanged(self) -> Any:
        """Put the position aside, which is that in another store, and take up the one in this store.

        Returns:
            The MLflow run here; None: there is none, and the position is at the beginning.
        """
        position = self._position
        stores = position.own.pop("stores", {})
        stores[position.own.get("uri", "")] = [position.mark, position.own]
        mark, own = stores.pop(self._uri, ((), {}))
        found = mlflow_run.exists(self._client, own["run_id"]) if own else None
        position.own = {}
        position.save(Mark(*mark) if found else Mark(), **(own if found else {}), stores=stores)
        return found

    def _create(self) -> None:
        """Make the MLflow run, in its experiment."""
        client, name = self._client, self._run.tracking.experiment
        found = client.get_experiment_by_name(name)
        if found is not None:
            experiment = found.experiment_id
        else:
            local = self._uri.startswith("sqlite:")
            artifacts = (Path(self._run.runs).resolve() / "mlartifacts").as_uri() if local else None
            experiment = client.create_experiment(name, artifact_location=artifacts)
        tags = mlflow_run.tags(self._folder, self._run) | mlflow_run.family(client, experiment, self._run)
        name, began = self._folder.resolve().name, mlflow_run.times(self._folder)[0]
        made = client.create_run(experiment, start_time=began, tags=tags, run_name=name)
        self._position.save(self._position.mark, run_id=made.info.run_id, uri=self._uri)

    def _tag(self, tags: dict[str, str]) -> None:
        """Set tags of the run, in MLflow's portions."""
        from mlflow.entities import RunTag

        made = [RunTag(key, value) for key, value in tags.items()]
        for first in range(0, len(made), TAGS_A_CALL):
            self._client.log_batch(self._run_id, tags=made[first : first + TAGS_A_CALL])

    def take(self, lines: Sequence[Line], upto: Mark) -> None:
        """Send the lines."""
        self._send(lines)
        self._position.save(upto)

    def take_system(self, host: str, lines: Sequence[Line], marks: dict[str, Mark]) -> None:
        """Send what a machine wrote about itself, under the names of MLflow's own page of system metrics.

        Args:
            host: the machine's name.
            lines: new ones of its file.
            marks: of the files of all machines; before them everything is safe then.
        """
        self._send(lines, f"system/{host}/")
        self._position.save(self._position.mark, system=marks)

    def _send(self, lines: Sequence[Line], prefix: str = "") -> None:
        """Send the points of lines, in MLflow's portions."""
        from mlflow.entities import Metric

        metrics = [
            Metric(prefix + key, value, int(line.time * 1000), line.step)
            for line in lines
            for key, value in line.values.items()
        ]
        for first in range(0, len(metrics), METRICS_A_CALL):
            self._log(metrics[first : first + METRICS_A_CALL])

    def _log(self, metrics: list[Any]) -> None:
        """Send one portion; what MLflow will never take is written down and left out, so that the rest gets there."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._require_kept(self._client.get_run(self._run_id))  # which MLflow refuses with the same code
            if len(metrics) > 1:
                half = len(metrics) // 2
                self._log(metrics[:half])
                self._log(metrics[half:])
                return
            point = {"reason": str(error), **dict(metrics[0])}
            sys.stderr.write(f"mlflow: refuses {metrics[0].key} at step {metrics[0].step}: {error}\n")
            with (self._folder / "carried" / REFUSED).open("a") as file:
                file.write(json.dumps(point) + "\n")

    def finish(self, upto: Mark) -> None:
        """Send the run's small files and, if it is wished, its model; close the MLflow run, as the training is."""
        run_id, done = self._run_id, (self._folder / "done").exists()
        for name in ARTIFACTS:
            if (self._folder / name).exists():
                self._client.log_artifact(run_id, str(self._folder / name))
        for folder in ("events", "plots"):
            for file in sorted((self._folder / folder).glob("*.*")):
                self._client.log_artifact(run_id, str(file), folder)
        if done and self._run.tracking.register and not self._position.own.get("model"):
            from trainer.state import export
            from trainer.tracking import mlflow_model

            version = mlflow_model.register(export.of_run(self._folder), self._run.tracking.register, self._uri, run_id)
            self._position.save(self._position.mark, model=version)
        self._client.set_terminated(run_id, "FINISHED" if done else "KILLED", mlflow_run.times(self._folder)[1])
        self._position.save(upto)
