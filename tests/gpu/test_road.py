"""The whole road on one GPU: nccl, world 1, bf16, channels_last; stopped, continued, evaluated."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
for needed in ("deepspeed", "webdataset", "tyro", "rich", "safetensors", "pyarrow"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Shards of drawn pictures: bars whose direction is the class."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data") / "bars"
    draws = np.random.default_rng(0)
    for label in ("across", "down"):
        (source / label).mkdir()
        for number in range(160):
            noise = draws.integers(0, 90, (64, 64, 3), dtype=np.uint8)
            bars = (np.arange(64) // 8 % 2 * 160).astype(np.uint8)
            noise += bars[None, :, None] if label == "down" else bars[:, None, None]
            Image.fromarray(noise).save(source / label / f"{number}.png")
    command = [
        sys.executable,
        "-m",
        "trainer.cli",
        "data",
        "demo",
        "--out",
        str(out),
        "--source",
        "folder",
        str(source),
    ]
    subprocess.run(command, cwd=repository, check=True)
    return out


def train(data: Path, folder: Path, *more: str) -> list[str]:
    words = ["demo-digits", "--data.path", str(data), "--runs", str(folder), "--cluster.device", "cuda"]
    words += ["--cluster.ranks", "1", "--precision.dtype", "bf16", "--tracking.no-mlflow", "--tracking.log-every", "1"]
    return [sys.executable, "-m", "trainer.cli", "train", *words, *more]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_road_on_one_gpu(stage: int, pictures: Path, tmp_path: Path, repository: Path) -> None:
    words = ["--parallel.zero", str(stage), "--optim.steps", "60", "--optim.warmup-steps", "5", "--name", "run"]
    words += ["--checkpoint.every", "20", "--data.workers", "2"]
    command = train(pictures, tmp_path, *words)
    first = subprocess.Popen(command, cwd=repository)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 10) and first.poll() is None:
        assert time.monotonic() < deadline, "no ten steps"
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=200) in (0, 75)
    assert subprocess.run(command, cwd=repository, check=False).returncode == 0
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in steps if "train/loss" in row] == list(range(1, 61))
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["eval/top1"] > 0.9
