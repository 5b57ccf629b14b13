"""Rates: assumed from a data sheet, written, read, and refused when they are something else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import InputError
from models.activations import Attention, Dtype
from models.operations import WORKS, Style
from trainer.machine import devices
from trainer.planning import rates
from trainer.planning.rates import Rates, assumed

H100 = devices.DEVICES["h100"]


def plain() -> Rates:
    return assumed(H100, "bf16", "eager", 0, "auto", 50e9)


def test_assumptions_are_shares_of_the_data_sheet() -> None:
    found = plain()
    assert found.forward["matrix"] == pytest.approx(790e12, rel=0.01)  # as measured by others
    assert found.forward["norm"] == pytest.approx(3.0e12, rel=0.01)
    assert found.forward["product"] == pytest.approx(180e12, rel=0.02)
    assert found.forward.keys() == set(WORKS)
    assert "assumed" in found.origin
    assert assumed(H100, "fp32", "eager", 0, "auto", 50e9).forward["matrix"] == found.forward["matrix"] / 2
    assert assumed(H100, "bf16", "eager", 0, "explicit", 50e9).forward["product"] < found.forward["product"]


def test_measured_rates_replace_them(tmp_path: Path) -> None:
    asked: tuple[devices.Device, Dtype, Style, int, Attention, float] = (H100, "bf16", "eager", 0, "auto", 25e9)
    assert rates.of(*asked, tmp_path) == assumed(*asked)
    measured = replace(plain(), call=1e-3, measured=("forward", "backward"))
    path = measured.write(tmp_path)
    assert path.name == "h100-bf16-eager-sdpa-0.json"
    found = rates.of(*asked, tmp_path)
    assert found == replace(measured, network=0.8 * 25e9)  # the network was not measured, and is what the caller says
    left = "launch, step, update, hooks, copies, settling, wire, latency, network, hop, host, disk, overlap"
    assert found.origin == f"measured; assumed: {left}"
    other: tuple[devices.Device, Dtype, Style, int, Attention, float] = (H100, "bf16", "eager", 0, "flex", 25e9)
    assert rates.of(*other, tmp_path) == assumed(*other)  # another kernel's rates say nothing of this one
    assert rates.of(H100, "bf16", "eager", 0, "sdpa", 25e9, tmp_path) == found  # which is what "auto" was
    assert rates.of(H100, "fp32", "eager", 0, "auto", 25e9, tmp_path) == assumed(H100, "fp32", "eager", 0, "auto", 25e9)


@pytest.mark.parametrize("damage", ["no JSON", "field", "work", "zero", "list"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = plain().write(tmp_path)
    content = json.loads(path.read_text())
    if damage == "field":
        del content["hooks"]
    elif damage == "work":
        del content["forward"]["gelu"]
    elif damage == "zero":
        content["backward"]["matrix"] = 0
    path.write_text("{" if damage == "no JSON" else "[]" if damage == "list" else json.dumps(content))
    with pytest.raises(InputError, match="no file of rates"):
        rates.of(H100, "bf16", "eager", 0, "auto", 50e9, tmp_path)
