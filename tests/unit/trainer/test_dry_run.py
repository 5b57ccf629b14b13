"""`coatnet train RECIPE --dry-run` shows what would run and starts nothing."""

import json
import subprocess
import sys
from pathlib import Path

from configs import resolve
from trainer.engine.deepspeed_config import deepspeed_config, weights
from trainer.plan import layout
from trainer.planning.fit import estimate
from trainer.stages import partition


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


def test_a_pipeline_shows_its_stages_and_what_the_heaviest_needs(tmp_path: Path, repository: Path) -> None:
    done = coatnet(
        repository, "train", "coatnet0-in1k-224", "--dry-run", "--data.synthetic", "--runs", str(tmp_path),
        "--cluster.ranks", "8", "--cluster.device", "cpu", "--parallel.micro-batch", "16", "--norm.replica-batch", "16",
        "--parallel.pipeline", "4", "--parallel.zero", "3", "--parallel.recompute", "full",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sections = dict(part.split("\n", 1) for part in done.stdout.removeprefix("== ").split("\n\n== "))
    run = resolve.from_json(sections["configuration"])
    plan, cut = layout(run, 8), partition.stages(run, 1000, 16)
    assert sections["stages"] == partition.table(cut)
    assert sections["layout"].startswith(
        "4 stages x 2 replicas = 8 ranks; 2 replicas x 128 micro-batches x 16 images = global batch 4096"
    )
    heaviest = max(cut, key=lambda stage: stage.parameters)
    (title,) = [name for name in sections if name.startswith("DeepSpeed")]
    assert title == f"DeepSpeed (stage {cut.index(heaviest)}, with the most parameters)"
    assert json.loads(sections[title]) == deepspeed_config(run, plan, weights(run, 1000, heaviest.first, heaviest.last))
    worst = estimate(run, plan, 1000)
    assert f"about {worst.total / 1e9:.2f} GB a rank of stage {worst.stage}, which needs most (an" in sections["memory"]
    assert f"{worst.gathered / 1e9:.2f} whole weights" in sections["memory"]
    assert not list(tmp_path.iterdir())


def test_no_recipe(repository: Path) -> None:
    done = coatnet(repository, "train", "--dry-run")
    assert done.returncode == 76
    assert "recipe is missing" in done.stderr
