"""`coatnet train RECIPE --dry-run` shows what would run and starts nothing."""

import json
import subprocess
import sys
from pathlib import Path


def coatnet(repository: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "trainer.cli", *words]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_sections_of_a_paper_recipe(tmp_path: Path, repository: Path) -> None:
    done = coatnet(
        repository, "train", "coatnet0-in1k-224", "--dry-run", "--data.synthetic", "--runs", str(tmp_path),
        "--cluster.ranks", "8", "--cluster.device", "cpu", "--parallel.micro-batch", "32",
        "--parallel.recompute", "full",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout
    sections = dict(part.split("\n", 1) for part in text.removeprefix("== ").split("\n\n== "))
    assert json.loads(sections["configuration"])["model"]["name"] == "coatnet0"
    config = json.loads(sections["DeepSpeed"])
    assert config["zero_optimization"]["stage"] == 1
    assert config["gradient_clipping"] == 1.0
    assert config["train_batch_size"] == 4096
    assert "8 ranks x 16 micro-batches x 32 images" in sections["layout"]
    assert "BatchNorm over 256 images, 8 ranks a group" in sections["layout"]
    groups = sections["parameter groups"]
    assert "decay: weight decay 0.05" in groups
    assert "blocks.s3.0.attention.qkv.weight" in groups.split("no_decay")[0]
    assert "blocks.s3.0.attention.table" in groups.split("no_decay")[1]
    assert "10,000 of them warm-up, cosine" in sections["schedule"]
    assert "0.001 at 10000" in sections["schedule"]
    assert "25,036,948 parameters" in sections["counts"]
    assert "4,141,888,512 multiply-adds" in sections["counts"]
    assert not list(tmp_path.iterdir())


def test_no_recipe(repository: Path) -> None:
    done = coatnet(repository, "train", "--dry-run")
    assert done.returncode == 76
    assert "recipe is missing" in done.stderr
