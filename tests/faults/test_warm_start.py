"""Weights across resolutions, ZeRO stages and ranks, through the whole road on real ranks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import interop
from models.resize import resize_table
from trainer.state import export

pytestmark = pytest.mark.timeout(600)
Train = Callable[..., tuple[int, str]]
# A rate that is zero in float32, and statistics that stand still: what is saved after an update is what was filled in.
STILL = ("--optim.lr", "1e-50", "--optim.min-lr", "0", "--norm.momentum", "0", "--optim.steps", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module live."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(digits: Path, runs: Path, repository: Path) -> Train:
    """Runs `coatnet train` on a few steps of digits with averaged weights; more words override."""

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "trainer.cli", "train", "demo-digits", "--data.path", str(digits)]
        command += ["--runs", str(runs), "--optim.ema", "0.9", "--optim.warmup-steps", "1", "--tracking.no-mlflow"]
        command += ["--data.global-batch", "32", *words]
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


def laid_out(ranks: int, zero: int, resolution: int) -> tuple[str, ...]:
    """Options of a layout and a resolution."""
    words = ("--cluster.ranks", str(ranks), "--parallel.zero", str(zero), "--norm.replica-batch", "16")
    return (*words, "--model.resolution", str(resolution))


def resized(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors at the resolution of others, by the function that is tested on its own."""
    return {
        name: resize_table(tensor, *like[name].shape[1:]) if name.endswith("table") else tensor
        for name, tensor in tensors.items()
    }


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    """A run's events of one kind."""
    lines = (folder / "events" / "rank-00000.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.slow
def test_weights_go_from_one_rank_to_sharded_ranks_at_another_size_and_back(train: Train, runs: Path) -> None:
    code, said = train("--name", "small", *laid_out(1, 0, 64), "--optim.steps", "3", "--norm.momentum", "0.5")
    assert code == 0, said
    file, _ = export.export(runs / "small")
    exported = dict(interop.read(file).tensors)
    assert interop.read(file).card.weights == "ema"

    larger = ("--name", "large", *laid_out(2, 3, 96), *STILL, "--init.path", str(runs / "small"))
    code, said = train(*larger, "--steps", "1")
    assert code == 0, said
    assert "starts from the ema weights of" in said
    for kind in ("raw", "ema"):
        state = dict(export.of_run(runs / "large", choice=kind).tensors)
        assert state["blocks.s3.0.attention.table"].shape == (4, 11, 11)
        assert not differing(state, resized(exported, state))
        assert not differing(state, dict(interop.load_model(file, 96).state_dict()))
    (event,) = events(runs / "large", "init")
    assert (event["path"], event["weights"], event["of_step"]) == (str(runs / "small"), "ema", 3)
    complete = runs / "small" / "checkpoints" / "step-00000003" / "COMPLETE"
    assert event["digest"] == complete.read_text()

    shutil.move(runs / "small", runs / "moved-away")  # a run with a checkpoint of its own needs it no more
    code, said = train(*larger)
    assert code == 0, said
    assert [event["step"] for event in events(runs / "large", "resume")] == [1]
    assert len(events(runs / "large", "init")) == 1

    back, _ = export.export(runs / "large", out=runs / "large.safetensors")
    code, said = train("--name", "back", *laid_out(1, 0, 64), *STILL, "--init.path", str(back))
    assert code == 0, said
    state = dict(export.of_run(runs / "back", choice="raw").tensors)
    assert not differing(state, resized(dict(interop.read(back).tensors), state))
    assert state["blocks.s3.0.attention.table"].shape == (4, 7, 7)


def test_weights_that_do_not_fit_are_refused_before_anything_starts(train: Train, runs: Path, tmp_path: Path) -> None:
    code, said = train("--name", "bad", "--init.path", str(tmp_path / "nothing"))
    assert code == 76
    assert "no run folder and no file; `coatnet export RUN` writes one" in said
    assert "Traceback" not in said
    assert not (runs / "bad").exists()
