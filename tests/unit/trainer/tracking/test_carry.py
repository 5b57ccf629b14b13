"""The run's lines reach real MLflow, TensorBoard and W&B stores: all of them, once, whatever happens to the writer."""

import fcntl
import importlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import resolve
from configs.schema import Run
from trainer import cli
from trainer.tracking.destination import Mark, Position, unread
from trainer.tracking.track import CarryProcess, RunLog, tracking_uri, wanted

Points = list[tuple[int, float]]  # (step, train/loss)
wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # generated code, half typed


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for what must come; the test's own time limit ends a wait in vain."""
    while not true():
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that names all destinations, its folder made."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain = resolve.load("demo-digits")
    return made(replace(plain, runs=str(tmp_path), name="mine", tracking=replace(plain.tracking, tensorboard=True,
                wandb=True)))  # fmt: skip


def made(run: Run) -> Run:
    """The run, with its run.json."""
    folder_of(run).mkdir(exist_ok=True)
    (folder_of(run) / "run.json").write_text(resolve.to_json(run))
    return run


def folder_of(run: Run) -> Path:
    return Path(run.runs) / run.name


def carry_once(run: Run) -> int:
    """A session after the run, by hand."""
    return subprocess.run([sys.executable, "-m", "trainer.tracking.carry", str(folder_of(run))], check=False).returncode


def mlflow_run(run: Run) -> tuple[MlflowClient, Any]:
    """The only MLflow run, and a client to ask for more."""
    client = MlflowClient(tracking_uri=tracking_uri(run))
    experiment = client.get_experiment_by_name("coatnet")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def in_mlflow(run: Run) -> Points:
    """The points of the only MLflow run."""
    client, found = mlflow_run(run)
    return [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "train/loss")]


def in_tensorboard(run: Run) -> Points:
    """The points as TensorBoard reads them, nothing purged."""
    reader = EventAccumulator(str(folder_of(run) / "tensorboard"), purge_orphaned_data=False)
    reader.Reload()
    return [(point.step, point.value) for point in reader.Scalars("train/loss")]


def in_wandb(run: Run) -> Points:
    """The points in the only offline run, as `wandb sync` would find them."""
    (file,) = (folder_of(run) / "wandb").glob("offline-run-*/run-*.wandb")
    listed = subprocess.run([sys.executable, "-m", "wandb", "sync", "--dry-run", file.parent.parent],
                            capture_output=True, text=True, check=True, cwd=file.parent)  # fmt: skip
    assert "Would sync 1 run" in listed.stderr
    points: Points = []
    for whole in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(whole)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            assert row["_step"] == len(points)
            points.append((row["step"], row["train/loss"]))
    return points


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind seven bytes of header."""
    at, block, whole = 7, 32768, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # no room for another header: padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield whole
            whole = b""


READERS = {"mlflow": in_mlflow, "tensorboard": in_tensorboard, "wandb": in_wandb}


def test_two_sessions_carry_every_line_once(run: Run) -> None:
    folder = folder_of(run)
    first = CarryProcess(run, folder)
    log = RunLog(folder)
    for step, loss in ((10, 0.125), (20, 0.0625), (30, 0.5)):
        log.metrics(step, {"train/loss": loss, "perf/mfu": 0.5})
    assert first.close() is None
    log.metrics(20, {"train/loss": 0.25})  # resumed from an older save: a step comes again
    log.close()
    with (folder / "metrics.jsonl").open("a") as half:
        half.write('{"step": 50, "ti')  # a line that is still being written is left for later
    (folder / "done").write_text("20\n")
    assert carry_once(run) == 0

    points = [(10, 0.125), (20, 0.0625), (30, 0.5), (20, 0.25)]
    for name, read in READERS.items():
        assert sorted(read(run)) == sorted(points), name
    client, found_run = mlflow_run(run)
    assert found_run.info.run_name == "mine"
    assert found_run.info.status == "FINISHED"
    assert found_run.data.params == {key: str(value) for key, value in resolve.flat(run).items()}
    assert "run.json" in [artifact.path for artifact in client.list_artifacts(found_run.info.run_id)]


def test_a_killed_writer_goes_on_without_gap_or_repetition(run: Run, tmp_path: Path) -> None:
    folder = folder_of(run)
    process = CarryProcess(run, folder)
    log = RunLog(folder)
    log.metrics(1, {"train/loss": 1.0})
    wait_until(lambda: all(Position(folder, name).mark.lines == 1 for name in ("mlflow", "tensorboard")))
    shutil.copytree(folder / "carried", tmp_path / "before")
    log.metrics(2, {"train/loss": 0.5})
    wait_until(lambda: all(Position(folder, name).mark.lines == 2 for name in ("mlflow", "tensorboard")))
    wait_until(lambda: any((folder / "wandb").glob("offline-run-*/run-*.wandb")))
    (writer,) = (child for child in psutil.Process().children() if "trainer.tracking.carry" in child.cmdline())
    started = writer.children(recursive=True)
    writer.kill()
    assert "MLflow and TensorBoard and W&B" in str(process.close())
    # As if it had been killed after the second line was written and before the positions were.
    shutil.rmtree(folder / "carried")
    shutil.copytree(tmp_path / "before", folder / "carried")
    log.metrics(3, {"train/loss": 0.25})
    log.close()
    assert carry_once(run) == 0
    for name, read in READERS.items():
        assert read(run) == [(1, 1.0), (2, 0.5), (3, 0.25)], name
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in started))


def test_a_hanging_destination_delays_no_other(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = made(replace(run, tracking=replace(run.tracking, uri=uri)))
        folder = folder_of(run)
        process = CarryProcess(run, folder)
        log = RunLog(folder)
        log.metrics(1, {"train/loss": 1.0})
        log.close()
        wait_until(lambda: Position(folder, "tensorboard").mark.lines == 1)
        wait_until(lambda: any((folder / "wandb").glob("offline-run-*/run-*.wandb")))
        problem = process.close(patience=8.0)
    assert str(problem).startswith("MLflow did not take everything (logs/carry.log says why); metrics.jsonl has all")
    assert f"`coatnet track sync {folder}` carries the rest" in str(problem)
    assert in_tensorboard(run) == [(1, 1.0)]
    assert in_wandb(run) == [(1, 1.0)]


def test_a_dead_server_is_reported_and_carried_to_when_it_lives_again(run: Run) -> None:
    tracking = replace(run.tracking, uri="http://127.0.0.1:9", tensorboard=False, wandb=False)
    dead = made(replace(run, tracking=tracking))
    process = CarryProcess(dead, folder_of(run))
    log = RunLog(folder_of(run))
    log.metrics(1, {"train/loss": 1.0})
    log.close()
    assert "MLflow did not take everything" in str(process.close())
    assert "mlflow: will be tried again" in (folder_of(run) / "logs/carry.log").read_text()
    alive = made(replace(run, tracking=replace(tracking, uri="")))
    assert carry_once(alive) == 0
    assert in_mlflow(alive) == [(1, 1.0)]


def test_a_destination_that_failed_is_opened_again(run: Run) -> None:
    run = made(replace(run, tracking=replace(run.tracking, mlflow=False, wandb=False)))
    folder = folder_of(run)
    (folder / "tensorboard").write_text("a file where a folder must be")
    process = CarryProcess(run, folder)
    RunLog(folder).metrics(1, {"train/loss": 1.0})
    wait_until(lambda: "FileExistsError" in (folder / "logs/carry.log").read_text())
    (folder / "tensorboard").unlink()
    assert process.close() is None
    assert in_tensorboard(run) == [(1, 1.0)]


def test_a_deleted_tensorboard_folder_is_written_anew(run: Run) -> None:
    run = made(replace(run, tracking=replace(run.tracking, mlflow=False, wandb=False)))
    log = RunLog(folder_of(run))
    log.metrics(1, {"train/loss": float("nan")})
    assert carry_once(run) == 0
    ((step, loss),) = in_tensorboard(run)
    assert step == 1
    assert loss != loss
    shutil.rmtree(folder_of(run) / "tensorboard")
    log.metrics(2, {"train/loss": 0.5})
    log.close()
    assert carry_once(run) == 0
    assert [step for step, _ in in_tensorboard(run)] == [1, 2]


def test_a_run_without_destinations_needs_no_process(run: Run) -> None:
    run = made(replace(run, tracking=replace(run.tracking, mlflow=False, tensorboard=False, wandb=False)))
    assert wanted(run) == []
    assert carry_once(run) == 0
    assert os.listdir(folder_of(run)) == ["run.json"]


def test_track_sync_carries_what_nobody_did(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run = made(replace(run, tracking=replace(run.tracking, mlflow=False, wandb=False)))
    folder = folder_of(run)
    log = RunLog(folder)
    log.metrics(1, {"train/loss": 1.0})
    assert cli.main(["track", "sync", str(folder)]) == 0
    assert f"{folder}: TensorBoard has 1 of 1 lines" in capfd.readouterr().out
    log.metrics(2, {"train/loss": 0.5})
    with (folder / "carried" / "lock").open() as held:  # as the process beside a training does
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli.main(["track", "sync", str(folder), "--json"]) == 75
    said = capfd.readouterr()
    assert "another process carries" in said.err
    assert json.loads(said.out)[str(folder)]["tensorboard"] == {"lines": 1, "of": 2, "whole": False}
    assert cli.main(["track", "sync", str(folder)]) == 0
    assert in_tensorboard(run) == [(1, 1.0), (2, 0.5)]


def test_track_refuses_wrong_words(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["sink", "x"], "did you mean 'sync'"), (["sync", "nowhere"], "not a run folder")):
        assert cli.main(["track", *words]) == 76
        assert said in capfd.readouterr().err


def test_what_a_full_disk_left_of_a_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0, "a": 1}\n\n{"step": 2, "ti\n{"step": 3, "time": 3.0}\n{"step"')
    lines, mark = unread(path, Mark())
    assert [(line.number, line.step) for line in lines] == [(0, 1), (3, 3)]
    assert mark.lines == 4
    assert unread(path, mark) == ([], mark)
