"""Counters of energy that begin anew, and what a machine writes about itself."""

import json
import socket
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from configs import resolve
from trainer.cluster import Member
from trainer.cost import energy
from trainer.cost.energy import EnergyMeter, Packages, assumed_watts, holding
from trainer.machine import watch as machine
from trainer.machine.devices import CORE_WATTS, DEVICES


def powercap(root: Path, zones: dict[str, tuple[str, int, int]]) -> None:
    """A tree as Linux's powercap has it: zone to (name, count, span)."""
    for zone, (name, count, span) in zones.items():
        (root / zone).mkdir(parents=True, exist_ok=True)
        (root / zone / "name").write_text(name + "\n")
        (root / zone / "energy_uj").write_text(f"{count}\n")
        (root / zone / "max_energy_range_uj").write_text(f"{span}\n")


def test_packages_and_their_memory_count_once_over_the_end_of_the_range(tmp_path: Path) -> None:
    zones = {
        "intel-rapl:0": ("package-0", 900, 999),
        "intel-rapl:0:0": ("core", 500, 999),  # inside the package
        "intel-rapl:0:1": ("dram", 10, 999),
        "intel-rapl:1": ("package-1", 0, 999),
        "intel-rapl:2": ("psys", 700, 999),  # around everything
    }
    powercap(tmp_path, zones)
    packages = Packages(tmp_path)
    assert packages.joules() == 0
    for count in (950, 40, 100):  # from 999 the counter goes on at 0
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text(str(count))
        packages.joules()
    (tmp_path / "intel-rapl:0:1" / "energy_uj").write_text("15")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("800")
    assert packages.joules() == pytest.approx((200 + 5) / 1e6)


def test_no_counters_are_no_error_for_a_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no counters"):
        Packages(tmp_path)


def test_a_meter_of_processors_is_of_all_ranks_here(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 0, 10**12)})
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    meter = EnergyMeter(member)
    assert meter.meters == "RAPL"
    time.sleep(0.02)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7000000")
    joules, seconds = meter.read()
    assert joules == 7.0
    assert seconds >= 4 * 0.02
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # the driver goes away: the figures stay, the run goes on
    assert meter.read() == (joules, seconds)
    silent = EnergyMeter(replace(member, speaks=False))  # another rank of the same machine
    assert (silent.meters, silent.read()) == ("", (0.0, 0.0))


def test_an_assumption_is_the_runs_or_the_devices(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cores = len(psutil.Process().cpu_affinity())
    assert assumed_watts(member, 0.0) == CORE_WATTS * cores / 2
    assert assumed_watts(member, 33.0) == 33.0
    run = resolve.load("demo-digits")
    priced = replace(run, cluster=replace(run.cluster, price=0.5, currency="EUR"))
    held = holding(priced, member, EnergyMeter(member))
    assert (held.device, held.price, held.currency, held.seconds) == ("cpu", 0.5, "EUR", 0.0)
    assert holding(run, member, EnergyMeter(member)).price is None
    assert DEVICES["h100"].watts == 700  # data sheet of the SXM5 module


def test_a_machine_writes_what_it_does(member: Member, tmp_path: Path) -> None:
    step = 3
    with machine.watched(tmp_path, 0.02, lambda: step, EnergyMeter(member)):
        path = tmp_path / "system" / f"{socket.gethostname()}.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < 2:
            time.sleep(0.01)
        step = 4
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert (lines[0]["step"], lines[-1]["step"]) == (3, 4)
    memory = psutil.virtual_memory().used / 1e6
    assert lines[-1]["system_memory_usage_megabytes"] == pytest.approx(memory, rel=0.5)
    assert 0 <= lines[-1]["cpu_utilization_percentage"] <= 100
    assert lines[-1]["network_receive_megabytes"] >= lines[0]["network_receive_megabytes"] >= 0


def test_a_machine_may_keep_silent(member: Member, tmp_path: Path) -> None:
    with machine.watched(tmp_path, 0.0, lambda: 0, EnergyMeter(member)):
        pass
    assert not list(tmp_path.iterdir())
