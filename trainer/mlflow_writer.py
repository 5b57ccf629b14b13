"""A run's figures in MLflow: one MLflow run for the whole life of a run folder, however often it is resumed."""

from collections.abc import Sequence
from pathlib import Path

from configs import resolve
from configs.schema import Run
from trainer.destination import Line, Mark, Position
from trainer.track import tracking_uri

METRICS_A_CALL, PARAMETERS_A_CALL = 1000, 100  # MLflow's limits for one call


class MlflowWriter:
    """One run folder's MLflow run. Lines sent again after a kill are the same points: the store keeps them once."""

    def __init__(self, folder: Path, run: Run, position: Position) -> None:
        from mlflow.tracking import MlflowClient

        self._folder, self._run, self._position = folder, run, position
        self._uri = tracking_uri(run)
        self._client = MlflowClient(tracking_uri=self._uri)
        self.start = position.mark
        if "run_id" in position.own:
            self._client.update_run(position.own["run_id"], status="RUNNING")
        else:
            self._create()
        if not position.own.get("described"):
            self._describe()

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
        tags = {
            "recipe": self._run.recipe,
            "config": resolve.digest(self._run),
            "run_folder": str(self._folder.resolve()),
        }
        made = client.create_run(experiment, run_name=self._folder.name, tags=tags)
        self._position.save(self._position.mark, run_id=made.info.run_id)

    def _describe(self) -> None:
        """Log the settings, once: MLflow refuses a parameter's second value, and a resumed run may differ in layout."""
        from mlflow.entities import Param

        parameters = [Param(key, str(value)) for key, value in resolve.flat(self._run).items()]
        for first in range(0, len(parameters), PARAMETERS_A_CALL):
            some = parameters[first : first + PARAMETERS_A_CALL]
            self._client.log_batch(self._position.own["run_id"], params=some)
        self._position.save(self._position.mark, described=True)

    def take(self, lines: Sequence[Line], upto: Mark) -> None:
        """Send the lines."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, int(line.time * 1000), line.step) for line in lines for key, value in line.values.items()
        ]
        for first in range(0, len(metrics), METRICS_A_CALL):
            some = metrics[first : first + METRICS_A_CALL]
            self._client.log_batch(self._position.own["run_id"], metrics=some)
        self._position.save(upto)

    def finish(self, upto: Mark) -> None:
        """Send the run's small files; close the MLflow run, as finished when the training is."""
        run_id = self._position.own["run_id"]
        for name in ("run.json", "deepspeed.json", "environment.json", "evaluation.json"):
            if (self._folder / name).exists():
                self._client.log_artifact(run_id, str(self._folder / name))
        done = (self._folder / "done").exists()
        self._client.set_terminated(run_id, status="FINISHED" if done else "KILLED")
        self._position.save(upto)
