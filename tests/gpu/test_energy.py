"""NVML's counter of a GPU's energy while it works and while it rests."""

import time
from pathlib import Path

import pytest
import torch

from trainer.cluster import Member
from trainer.cost.energy import EnergyMeter, board_of
from trainer.machine import watch as machine

pytestmark = pytest.mark.gpu
pytest.importorskip("pynvml", reason="the package nvidia-ml-py is not installed: energy is then an estimate")


def spent(meter: EnergyMeter, seconds: float, work: bool) -> float:
    """Watts of this GPU over so many seconds of work or rest."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    first, began = meter.read()[0], time.monotonic()
    while time.monotonic() - began < seconds:
        if work:
            for _ in range(20):
                x @ x
            torch.cuda.synchronize()
        else:
            time.sleep(0.1)
    return (meter.read()[0] - first) / (time.monotonic() - began)


def test_work_takes_more_energy_than_rest(member: Member) -> None:
    if board_of(member.device) is None:
        pytest.skip("this GPU, or its driver, has no counter of energy")
    meter = EnergyMeter(member)
    assert meter.meters.startswith("NVML")
    rest, work = spent(meter, 3.0, work=False), spent(meter, 3.0, work=True)
    assert work > 1.5 * rest > 0
    joules, seconds = meter.read()
    assert joules > 0
    assert seconds >= 6.0  # one device


def test_a_machine_tells_of_its_gpus(member: Member, tmp_path: Path) -> None:
    line = machine.Machine(tmp_path, lambda: 7, EnergyMeter(member)).line()
    for number in range(torch.cuda.device_count()):
        assert line[f"gpu_{number}_memory_usage_megabytes"] > 0
        assert line[f"gpu_{number}_power_usage_watts"] > 0
        assert 0 <= line[f"gpu_{number}_utilization_percentage"] <= 100
