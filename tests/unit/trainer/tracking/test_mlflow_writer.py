"""What MLflow is told about a run, in a real store: tags, data, lineage, sweeps, machines, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from configs import resolve
from configs.schema import Run
from trainer.tracking import carry, mlflow_run
from trainer.tracking.destination import Line, Mark, Position, unread
from trainer.tracking.mlflow_writer import MlflowWriter
from trainer.tracking.track import RunLog

Make = Callable[..., Run]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that the tests of this file share, each with an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def make(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> Make:
    """Makes a run with its folder, as training leaves it at its start."""
    experiment = request.node.name

    def made(name: str, init: str = "", **tracking: Any) -> Run:
        plain = resolve.load("demo-digits")
        wish = replace(plain.tracking, uri=store, experiment=experiment, **tracking)
        run = replace(plain, name=name, runs=str(tmp_path), tracking=wish, init=replace(plain.init, path=init))
        folder = Path(run.folder)
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(resolve.to_json(run))
        (folder / "environment.json").write_text(json.dumps({"commit": "0123456789ab+"}))
        split = {"samples": 90, "shards": 3, "bytes": 1000, "fingerprint": "ab" * 32, "sources": []}
        data = {"root": "/data/digits", "label_kind": "single", "vocabulary": ["zero", "one"], "card": {},
                "splits": {"train": split, "heldout": split | {"fingerprint": "cd" * 32}}}  # fmt: skip
        (folder / "data.json").write_text(json.dumps(data))
        return run

    return made


def opened(run: Run) -> tuple[MlflowWriter, Position]:
    position = Position(Path(run.folder), "mlflow")
    return MlflowWriter(Path(run.folder), run, position), position


def stored(run: Run, position: Position) -> Any:
    return MlflowClient(run.tracking.uri).get_run(position.own["run_id"])


def point(step: int, **values: float) -> Line:
    return Line(0, step, 1000.0 + step, values)


def test_where_a_run_comes_from_and_where_it_ran(make: Make) -> None:
    run = make("first")
    log = RunLog(Path(run.folder))
    for kind, job in (("start", "17"), ("resume", "18")):
        log.event(kind, world=8, device="NVIDIA H100", host="node1", job=job, cluster="blue")
    log.close()
    writer, position = opened(run)
    (Path(run.folder) / "done").write_text("1\n")
    writer.finish(Mark())
    found = stored(run, position)
    expected = {
        "recipe": "demo-digits", "config": resolve.digest(run), "git_commit": "0123456789ab+", "job_id": "17 18",
        "mlflow.source.git.commit": "0123456789ab", "mlflow.source.type": "JOB", "cluster": "blue", "host": "node1",
        "device": "NVIDIA H100", "world": "8",
    }  # fmt: skip
    assert expected.items() <= found.data.tags.items()
    assert "recipe `demo-digits`" in found.data.tags["mlflow.note.content"]
    assert found.data.params == {key: str(value) for key, value in resolve.flat(run).items()}
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    inputs = {one.tags[0].value: one.dataset for one in found.inputs.dataset_inputs}
    assert inputs["training"].digest == "ab" * 18
    assert inputs["evaluation"].name == "digits/heldout"
    assert json.loads(inputs["training"].profile) == {"samples": 90, "shards": 3, "bytes": 1000, "classes": 2}
    client = MlflowClient(run.tracking.uri)
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert names == {"run.json", "environment.json", "data.json", "events"}


def test_a_fine_tuning_lies_under_its_pre_training(make: Make) -> None:
    base = make("base")
    _, origin = opened(base)
    exported = Path(base.folder) / "export" / "base-raw.safetensors"  # a file in the run's folder names it as well
    for name, path in (("tuned", base.folder), ("tuned-from-file", str(exported))):
        tuned = make(name, path)
        _, position = opened(tuned)
        tags = stored(tuned, position).data.tags
        assert tags["init.run_id"] == tags["mlflow.parentRunId"] == origin.own["run_id"]
    stranger = make("stranger", "/nowhere/x.safetensors")
    _, position = opened(stranger)
    assert "mlflow.parentRunId" not in stored(stranger, position).data.tags


def test_runs_of_a_sweep_lie_under_one_run(make: Make) -> None:
    runs = [make(f"lr-{number}", sweep="lr") for number in range(2)]
    parents = {stored(run, opened(run)[1]).data.tags["mlflow.parentRunId"] for run in runs}
    assert len(parents) == 1
    client = MlflowClient(runs[0].tracking.uri)
    parent = client.get_run(parents.pop())
    assert parent.info.run_name == "lr"
    # Another element made one at the same moment, and has not seen this one: both take the older.
    experiment = parent.info.experiment_id
    client.create_run(experiment, tags={mlflow_run.SWEEP: "lr"}, start_time=parent.info.start_time + 1)
    late = make("lr-2", sweep="lr")
    assert stored(late, opened(late)[1]).data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_machines_have_metrics_of_their_own(make: Make) -> None:
    run = make("machines")
    folder = Path(run.folder) / "system"
    folder.mkdir()
    line = {"step": 5, "time": 2000.0, "cpu_utilization_percentage": 50.0, "gpu_0_power_usage_watts": 650.5}
    (folder / "node1.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "node2.jsonl").write_text(json.dumps(line | {"cpu_utilization_percentage": 75.0}) + "\n")
    writer, position = opened(run)
    carry._system(writer, Path(run.folder), position)
    with (folder / "node1.jsonl").open("a") as file:
        file.write(json.dumps(line | {"step": 6, "time": 2015.0}) + '\n{"step": 7, "ti')
    carry._system(writer, Path(run.folder), Position(Path(run.folder), "mlflow"))  # another session
    client, run_id = MlflowClient(run.tracking.uri), position.own["run_id"]
    history = client.get_metric_history(run_id, "system/node1/gpu_0_power_usage_watts")
    assert [(one.step, one.timestamp, one.value) for one in history] == [(5, 2000000, 650.5), (6, 2015000, 650.5)]
    assert stored(run, position).data.metrics["system/node2/cpu_utilization_percentage"] == 75.0


def test_what_mlflow_never_takes_holds_nothing_else_up(make: Make) -> None:
    run = make("refused")
    writer, position = opened(run)
    bad = "no such name!"
    writer.take([point(1, loss=1.0), point(2, **{"loss": 0.5, bad: 7.0}), point(3, loss=0.25)], Mark(99, 3))
    client = MlflowClient(run.tracking.uri)
    assert [one.value for one in client.get_metric_history(position.own["run_id"], "loss")] == [1.0, 0.5, 0.25]
    (line,) = (Path(run.folder) / "carried" / "mlflow-refused.jsonl").read_text().splitlines()
    refused = json.loads(line)
    assert (refused["key"], refused["value"], refused["step"]) == (bad, 7.0, 2)
    assert position.mark == Mark(99, 3)


def test_a_run_continued_in_another_layout_says_so(make: Make) -> None:
    run = make("elastic")
    _, position = opened(run)
    other = replace(run, parallel=replace(run.parallel, zero=1))
    opened(other)
    found = stored(run, position)
    assert found.data.params["parallel.zero"] == "3"
    assert found.data.tags["changed.parallel.zero"] == "1"


def test_a_run_deleted_by_hand_is_not_written_to(make: Make) -> None:
    run = make("gone")
    _, position = opened(run)
    MlflowClient(run.tracking.uri).delete_run(position.own["run_id"])
    with pytest.raises(RuntimeError, match="was deleted: restore it there"):
        opened(run)


def test_a_run_deleted_while_it_trains_loses_nothing_once_it_is_restored(make: Make) -> None:
    run = make("deleted")
    folder = Path(run.folder)
    log = RunLog(folder)
    log.metrics(1, {"loss": 1.0})
    writer, position = opened(run)
    writer.take(*unread(folder / "metrics.jsonl", writer.start))
    client = MlflowClient(run.tracking.uri)
    client.delete_run(position.own["run_id"])
    log.metrics(2, {"loss": 0.5})
    with pytest.raises(RuntimeError, match="then say `coatnet track sync"):
        writer.take(*unread(folder / "metrics.jsonl", position.mark))
    assert not (folder / "carried" / "mlflow-refused.jsonl").exists()
    client.restore_run(position.own["run_id"])
    again, position = opened(run)
    again.take(*unread(folder / "metrics.jsonl", again.start))
    history = client.get_metric_history(position.own["run_id"], "loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 0.5)]


def test_each_store_has_its_own_position(make: Make, tmp_path: Path) -> None:
    run = make("two")
    folder = Path(run.folder)
    log = RunLog(folder)
    log.metrics(1, {"loss": 1.0})
    writer, position = opened(run)
    writer.take(*unread(folder / "metrics.jsonl", writer.start))
    other = replace(run, tracking=replace(run.tracking, uri=f"sqlite:///{tmp_path}/other.db"))
    log.metrics(2, {"loss": 0.5})
    for one, new in ((other, 2), (run, 1), (other, 0)):
        writer, position = opened(one)
        lines, upto = unread(folder / "metrics.jsonl", writer.start)
        assert len(lines) == new
        writer.take(lines, upto)
        history = MlflowClient(one.tracking.uri).get_metric_history(position.own["run_id"], "loss")
        assert [point.value for point in history] == [1.0, 0.5]
    position.save(position.mark, run_id="0" * 32)  # the store was made anew
    writer, position = opened(other)
    assert writer.start == Mark()
