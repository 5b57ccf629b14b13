"""What MLflow is told about a run beside its figures: tags, parameters, data sets, and which run it belongs under."""

import getpass
import json
from pathlib import Path
from typing import Any

from configs import resolve
from configs.schema import Run
from trainer.tracking import data_card
from trainer.tracking.destination import Position
from trainer.tracking.track import events

PARAMETERS_A_CALL = 100  # MLflow's limit
NAME_BYTES = 500  # of a data set, likewise
DIGEST_BYTES = 36
SOON = 50  # runs under one name that are looked through
PARENT = "mlflow.parentRunId"  # the page shows a run under this one
SWEEP = "coatnet.sweep"  # tag of the run that the runs of a sweep lie under


def tags(folder: Path, run: Run) -> dict[str, str]:
    """Where a run comes from and where it ran, from its own folder."""
    environment = _json(folder / "environment.json")
    starts = [event for event in events(folder) if event.get("event") in ("start", "resume")]
    commit = str(environment.get("commit", "unknown"))
    found = {
        "recipe": run.recipe,
        "config": resolve.digest(run),
        "run_folder": str(folder.resolve()),
        "git_commit": commit,
        "mlflow.source.git.commit": commit.rstrip("+"),
        "mlflow.source.git.dirty": str(commit.endswith("+")).lower(),
        "mlflow.source.name": f"coatnet train {run.recipe}",
        "mlflow.source.type": "JOB" if any(event.get("job") for event in starts) else "LOCAL",
        "mlflow.user": _user(),
        "mlflow.note.content": _note(run),
        "cluster": _each(starts, "cluster"),
        "job_id": _each(starts, "job"),
        "host": _each(starts, "host"),
        "device": _each(starts, "device"),
        "world": _each(starts, "world"),
    }
    return {name: value for name, value in found.items() if value}


def times(folder: Path) -> tuple[int | None, int | None]:
    """When the run began and when it was last heard of, in milliseconds; None: now."""
    known = [round(float(event["time"]) * 1000) for event in events(folder)]
    return (known[0], known[-1]) if known else (None, None)


def changed(client: Any, run_id: str, run: Run) -> dict[str, str]:
    """Settings in which a continued run differs from the parameters that MLflow has, which can have no second value."""
    had = client.get_run(run_id).data.params
    now = {key: str(value) for key, value in resolve.flat(run).items()}
    return {f"changed.{key}": value for key, value in now.items() if key in had and had[key] != value}


def log_parameters(client: Any, run_id: str, run: Run) -> None:
    """Log every setting under its dotted name."""
    from mlflow.entities import Param

    parameters = [Param(key, str(value)) for key, value in resolve.flat(run).items()]
    for first in range(0, len(parameters), PARAMETERS_A_CALL):
        client.log_batch(run_id, params=parameters[first : first + PARAMETERS_A_CALL])


def log_data(client: Any, run_id: str, folder: Path) -> None:
    """Log what the run is trained on and what it is scored on, with the fingerprints of both."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = data_card.read(folder)
    if data is None:
        return
    inputs = []
    for name, context in (("train", "training"), ("heldout", "evaluation")):
        split = data["splits"].get(name)
        if split is None:
            continue
        source = json.dumps({"uri": data["root"], "split": name})
        profile = {key: split[key] for key in ("samples", "shards", "bytes")} | {"classes": len(data["vocabulary"])}
        schema = {"picture": "jpeg", "labels": data["label_kind"]}
        title = f"{Path(str(data['root'])).name or 'data'}/{name}"
        made = Dataset(
            title[:NAME_BYTES],
            split["fingerprint"][:DIGEST_BYTES],
            "coatnet-shards",
            source,
            json.dumps(schema),
            json.dumps(profile),
        )
        inputs.append(DatasetInput(made, [InputTag("mlflow.data.context", context)]))
    client.log_inputs(run_id, datasets=inputs)


def family(client: Any, experiment: str, run: Run) -> dict[str, str]:
    """Tags that put a run under its sweep's, or under the one whose weights it starts from.

    Of both, the page shows it under the sweep; the tag `init.run_id` names the other.
    """
    found: dict[str, str] = {}
    origin = began_from(client, run)
    if origin:
        found |= {"init.run_id": origin, PARENT: origin}
    if run.tracking.sweep:
        found[PARENT] = _sweep(client, experiment, run.tracking.sweep)
    return found


def began_from(client: Any, run: Run) -> str:
    """The MLflow run of the run folder in `init.path`; empty where there is none in this store."""
    folder = Path(run.init.path) if run.init.path else None
    while folder is not None and not (folder / "run.json").exists():
        folder = folder.parent if folder != folder.parent else None
    run_id = str(Position(folder, "mlflow").own.get("run_id", "")) if folder is not None else ""
    if run_id and exists(client, run_id) is None:
        return ""
    return run_id


def exists(client: Any, run_id: str) -> Any:
    """The MLflow run, None where the store has no such one."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def log_origin(client: Any, run_id: str, run: Run) -> None:
    """Name the logged model that the run starts from as its input, so that the model's own page leads here."""
    from mlflow.entities import LoggedModelInput

    origin = began_from(client, run)
    outputs = client.get_run(origin).outputs if origin else None
    models = [LoggedModelInput(model.model_id) for model in outputs.model_outputs] if outputs is not None else []
    if models:
        client.log_inputs(run_id, models=models[-1:])


def _sweep(client: Any, experiment: str, name: str) -> str:
    """The run that the runs of a sweep lie under, made by whichever of them comes first.

    Two that come at the same moment may both make one: all take the older, and who made the other deletes it.
    """
    made = ""
    found = _of_sweep(client, experiment, name)
    if not found:
        tags = {SWEEP: name, "mlflow.user": _user(), "mlflow.note.content": f"The runs of the sweep {name}."}
        made = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        client.set_terminated(made)
        found = _of_sweep(client, experiment, name)
    chosen = str(min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id)
    if made and made != chosen:
        client.delete_run(made)
    return chosen


def _of_sweep(client: Any, experiment: str, name: str) -> list[Any]:
    """The runs made for a sweep."""
    quoted = name.replace("'", "")
    return list(client.search_runs([experiment], f"tags.`{SWEEP}` = '{quoted}'", max_results=SOON))


def _note(run: Run) -> str:
    """The description that the page shows."""
    summary = resolve.summary(run.recipe) if run.recipe in resolve.RECIPES else ""
    return (
        f"**{run.model.name}** at {run.model.resolution} px, recipe `{run.recipe}`. {summary}\n\nreport.html among the "
        "artifacts has the whole run on one page; `cost/` has what it cost in TPUv3-core-days."
    ).strip()


def _each(starts: list[dict[str, Any]], name: str) -> str:
    """The values of a fact over all starts, each once, in their order."""
    return " ".join(dict.fromkeys(str(event[name]) for event in starts if event.get(name)))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of the run's folder, empty if it is not there."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _user() -> str:
    """Who runs this; a container may know nobody of that number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
