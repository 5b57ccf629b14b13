"""The checks of a machine on its GPUs: a healthy one has no complaint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.finding import page, worst
from slurm import preflight
from trainer.machine import devices, doctor

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def test_every_gpu_is_seen_and_quick(repository: Path) -> None:
    found = doctor.devices() + doctor.matmuls()
    assert worst(found) in ("good", "note", "warning"), page(found)
    assert len(doctor.matmuls()) == torch.cuda.device_count()
    speed, peak = doctor.matmul_speed(0), devices.peak_of(torch.cuda.get_device_name(0))
    assert peak is None or speed < 1.1 * peak  # faster than possible is measured wrongly


def test_nvidia_smi_counts_the_same_gpus() -> None:
    found = preflight.gpus(torch.cuda.device_count(), preflight.nvidia_smi())
    assert worst(found) in ("good", "warning"), page(found)
    assert worst(preflight.gpus(1000, preflight.nvidia_smi())) == "bad"


def test_an_all_reduce_over_the_gpus() -> None:
    found = doctor.collectives(torch.cuda.device_count())
    assert worst(found) in ("good", "note"), page(found)
    assert "nccl" in found[0].said


def test_the_whole_command(repository: Path) -> None:
    command = [sys.executable, "-m", "trainer.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=500, check=False)
    names = {row["name"] for row in json.loads(done.stdout)}
    assert {"devices", "matmul", "collectives", "DeepSpeed ops", "FFCV"} <= names, done.stderr
