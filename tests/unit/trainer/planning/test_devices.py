"""The table of devices, and what may stand in for a row of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from trainer.machine import devices

OWN = {
    "peak": 1e15, "memory": 64e9, "bandwidth": 2e12, "link": 1e11, "host": 2e10, "watts": 500, "per_node": 4,
    "host_memory": 256e9,
}  # fmt: skip


def test_every_row_is_plausible_and_has_a_source() -> None:
    assert {"h100", "h200", "a100", "b200", "rtx4090"} <= devices.DEVICES.keys()
    for device in devices.DEVICES.values():
        assert device.peak is not None
        assert device.source
        assert 50 < device.peak / device.bandwidth < 500, device.name  # FLOP for each byte
        assert device.host <= device.link <= device.bandwidth
        assert devices.of_driver(f"NVIDIA {device.words}") == device
        assert 1.2 <= device.host_memory / (device.per_node * device.memory) <= 10, device.name
        assert re.search(r"; [\d,]+ GB of host memory: .", device.source)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA RTX A1000", None),
    ],
)  # fmt: skip
def test_a_driver_names_a_row(driver: str, name: str | None) -> None:
    found = devices.of_driver(driver)
    assert (found.name if found is not None else None) == name


def test_a_processor_is_shared_out() -> None:
    one, two = devices.named("cpu", 1), devices.named("cpu", 2)
    assert one.host == one.bandwidth == 2 * two.host  # bytes/s: its memory is the host's
    assert one.on_host
    assert one.peak is None
    assert (one.memory, one.watts) == (2 * two.memory, 2 * two.watts)
    assert one.host_memory == two.host_memory == one.memory == devices.memory_here()


def test_a_device_that_is_here_has_the_memory_that_is_here() -> None:
    found = devices.of_this_machine(devices.DEVICES["h100"])
    assert found.host_memory == devices.memory_here()
    assert found.source.startswith("NVIDIA H100 data sheet, SXM5; ")
    assert found.source.endswith("GB of host memory: this machine's")
    assert found.peak == devices.DEVICES["h100"].peak


def test_a_file_describes_a_device(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(OWN))
    found = devices.named(str(tmp_path / "mine.json"))
    assert (found.name, found.peak, found.per_node, found.host_memory) == ("mine", 1e15, 4, 256e9)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("h1000", None, "did you mean 'h100'"),
        ("absent.json", None, "cannot be read"),
        ("lacks.json", {key: value for key, value in OWN.items() if key != "watts"}, "watts"),
        ("host.json", {key: value for key, value in OWN.items() if key != "host_memory"}, "host_memory"),
        ("no-host.json", {**OWN, "host_memory": 0}, "host_memory = 0: must be a positive number"),
        ("more.json", {**OWN, "color": 1}, "nothing but"),
        ("wrong.json", {**OWN, "peak": -1}, "peak = -1: must be a positive number"),
        ("infinite.json", {**OWN, "link": float("inf")}, "link = inf: must be a positive number"),
        ("text.json", {**OWN, "memory": "64 GB"}, "memory = '64 GB'"),
        ("list.json", [1], "must be an object"),
    ],
)
def test_what_is_no_device_is_refused(name: str, content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(InputError) as refused:
        devices.named(str(path) if name.endswith(".json") else name)
    assert words in str(refused.value)
