"""Cost in the paper's currency against independently typed numbers (COATNET.md section 5)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import cost, spec
from models.spec import Stride
from trainer.cluster import peak_of
from trainer.ledger import P_REF, U_REF, Ledger


@pytest.mark.parametrize(
    ("name", "stride", "flops", "utilisation", "core_days"),
    [("coatnet3", "depthwise", 9.19e20, 0.298, 580), ("coatnet4", "expansion", 1.518e21, 0.301, 950),
     ("coatnet5", "expansion", 3.583e21, 0.370, 1820)],
)  # fmt: skip
def test_paper_rows(name: str, stride: Stride, flops: float, utilisation: float, core_days: float) -> None:
    multiply_adds = cost.count(spec.get(name), 224, stride).multiply_adds
    ledger = Ledger(multiply_adds, None, images=4_200_000_000)
    assert ledger.model_flops == pytest.approx(flops, rel=0.01)
    used = ledger.model_flops / (core_days * 86400 * P_REF)
    assert used == pytest.approx(utilisation, rel=0.01)


def test_device_days() -> None:
    assert Ledger(1, peak_of("NVIDIA A100-SXM4-80GB"), 1, 86400.0).core_days_device == pytest.approx(5.07, abs=0.01)
    assert Ledger(1, peak_of("NVIDIA H200"), 1, 86400.0).core_days_device == pytest.approx(16.09, abs=0.01)


@given(st.integers(10**9, 10**12), st.integers(1, 10**10), st.floats(1.0, 1e9), st.floats(1e12, 1e16))
def test_identity(multiply_adds: int, images: int, seconds: float, peak: float) -> None:
    ledger = Ledger(multiply_adds, peak, images, seconds)
    assert ledger.core_days_device is not None
    assert ledger.mfu is not None
    assert ledger.core_days_flops / ledger.core_days_device == pytest.approx(ledger.mfu / U_REF)


def test_unknown_device_leaves_figures_out() -> None:
    metrics = Ledger(10, peak_of("abacus"), 5, 3600.0).metrics()
    assert set(metrics) == {"cost/device_hours", "cost/model_flops", "cost/tpu_v3_core_days_flops"}
    assert metrics["cost/model_flops"] == 300


def test_state_round_trip() -> None:
    ledger = Ledger(10, None, 5, 7.5)
    other = Ledger(10, None)
    other.resume(ledger.state())
    assert other == ledger


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA GH200 480GB", 989.4e12),
     ("NVIDIA A10G", 70e12), ("NVIDIA A100-PCIE-40GB", 312e12)],
)  # fmt: skip
def test_peaks_take_the_longest_match(name: str, peak: float) -> None:
    assert peak_of(name) == peak
