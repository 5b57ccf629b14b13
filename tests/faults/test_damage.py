"""Training over damaged shards: stopped with the sample's name, or to the end with every replacement written down."""

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import damage
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.manifest import open_dataset
from data_pipeline.shard import read_sidecar

STEPS = 4
Train = Callable[..., "subprocess.CompletedProcess[str]"]


def encoded(number: int) -> bytes:
    """One of three kinds of pictures, each a little different."""
    file = io.BytesIO()
    picture = Image.linear_gradient("L").resize((32, 32)).rotate(120 * (number % 3) + number / 10)
    picture.convert("RGB").save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """230 pictures with a garbled one in each training shard and in the held-out split's first."""
    found = [Picture(f"p{n:04d}", "png", (n % 3,), f"p{n:04d}", partial(encoded, n)) for n in range(230)]
    data = write_dataset(found, tmp_path / "pictures", ["a", "b", "c"], "single", {}, 24)
    for path in (*data.split("train").shard_paths, data.split("heldout").shard_paths[0]):
        content = bytearray(Path(path).read_bytes())
        samples = (Path(path).with_suffix(".idx").stat().st_size - 28) // 12
        content[int(read_sidecar(path, samples).offsets[7]) + 600] ^= 255
        Path(path).write_bytes(content)
    return Path(data.root)


@pytest.fixture
def train(damaged: Path, tmp_path: Path, repository: Path) -> Train:
    """Trains an epoch of the damaged pictures to its end; more words override."""
    samples = open_dataset(damaged).split("train").samples

    def through(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "trainer.cli", "train", "demo-digits", "--data.path", str(damaged)]
        command += ["--runs", str(tmp_path / "runs"), "--name", "run", "--model.resolution", "32"]
        command += ["--data.global-batch", str(-(-samples // (64 * STEPS)) * 64), "--optim.warmup-steps", "1"]
        command += ["--optim.steps", str(STEPS), "--tracking.log-every", "1", "--tracking.no-mlflow"]
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryDirectory(prefix="t") as short:  # sockets have short names
            environment["TMPDIR"] = short
            done = subprocess.run([*command, *words], cwd=repository, env=environment, capture_output=True, text=True)
            assert not list(Path(short).glob("pymp-*")), "the loaders' folders stay behind"
        return done

    return through


def test_a_run_stops_at_damage_and_continues_by_replacing_it(train: Train, damaged: Path, tmp_path: Path) -> None:
    data, run = open_dataset(damaged), tmp_path / "runs" / "run"
    stopped = train("--cluster.ranks", "2")
    assert stopped.returncode == 76, stopped.stderr
    assert "sample 7 at byte" in stopped.stderr
    assert "do not match their checksum" in stopped.stderr
    assert not (run / damage.FILE).exists()

    small = train("--data.on-damage", "replace", "--data.damage-budget", "2", "--cluster.ranks", "1")
    assert small.returncode == 76, small.stderr
    assert "data.damage_budget = 2" in small.stderr
    assert damage.count(run) == 2

    through = train("--data.on-damage", "replace", "--cluster.ranks", "2", "--data.workers", "1")
    assert through.returncode == 0, through.stderr
    bad = [json.loads(line) for line in (run / damage.FILE).read_text().splitlines()]
    paths = {*data.split("train").shard_paths, data.split("heldout").shard_paths[0]}
    assert {(line["shard"], line["sample"]) for line in bad} == {(path, 7) for path in paths}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = [line["data/bad_samples"] for line in metrics if "data/bad_samples" in line]
    assert counts[-1] == len(data.split("train").shard_paths)
    assert np.all(np.diff(counts) >= 0)
    events = [json.loads(line) for line in (run / "events" / "rank-00000.jsonl").read_text().splitlines()]
    assert [event["bad_samples"] for event in events if event["event"] == "damage"][-1] == counts[-1]
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["eval/samples"] == data.split("heldout").samples - 1
