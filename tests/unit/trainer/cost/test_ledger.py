"""Cost in the paper's currency against independently typed numbers (COATNET.md section 5), and its identities."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import cost, spec
from models.spec import Stride
from trainer.cost.ledger import DAY, HOUR, KWH, P_REF, U_REF, Holding, Ledger, merged, of_state
from trainer.cost.paper import ROWS
from trainer.health.goodput import NS, Book, Clock
from trainer.machine.devices import peak_of

KINDS = (
    Holding("NVIDIA H100 80GB HBM3", 989.4e12, 2.5, "USD", 700.0, "NVML"),
    Holding("NVIDIA A100-SXM4-80GB", 312e12, 1.25, "USD", 400.0, ""),
    Holding("NVIDIA H100 80GB HBM3", 989.4e12, 3.0, "USD", 700.0, "NVML"),
)


def held(seconds: float, peak: float | None = None, **facts: Any) -> Holding:
    return Holding(peak=peak, seconds=seconds, **facts)


@pytest.mark.parametrize(
    ("name", "stride", "flops", "utilisation", "core_days"),
    [("coatnet3", "depthwise", 9.19e20, 0.298, 580), ("coatnet4", "expansion", 1.518e21, 0.301, 950),
     ("coatnet5", "expansion", 3.583e21, 0.370, 1820)],
)  # fmt: skip
def test_paper_rows(name: str, stride: Stride, flops: float, utilisation: float, core_days: float) -> None:
    multiply_adds = cost.count(spec.get(name), 224, stride).multiply_adds
    ledger = Ledger(multiply_adds, images=4_200_000_000)
    assert ledger.model_flops == pytest.approx(flops, rel=0.01)
    used = ledger.model_flops / (core_days * 86400 * P_REF)
    assert used == pytest.approx(utilisation, rel=0.01)


# Typed from the paper's table 5 and from 6 x multiply-adds x 14 x 300 million by hand; None: it prints no images.
TYPED = {
    "coatnet3-dagger-jft300m-224": (580, 9.19e20, 0.298),
    "coatnet4-jft300m-224": (950, 1.518e21, 0.301),
    "coatnet5-jft300m-224": (1_820, 3.583e21, 0.370),
    "coatnet6-jft3b-224": (6_600, None, None),
    "coatnet7-jft3b-224": (20_100, None, None),
    "vit-l16-jft300m": (680, None, None),
    "vit-h14-jft300m": (2_500, None, None),
    "nfnet-f4plus-jft300m": (1_860, None, None),
    "vit-g14-jft3b": (30_000, None, None),
}


def test_rows_of_table_5_against_typed_numbers() -> None:
    assert ROWS.keys() == TYPED.keys()
    for name, (core_days, flops, utilisation) in TYPED.items():
        row = ROWS[name]
        assert row.core_days == core_days, name
        assert row.model_flops == (None if flops is None else pytest.approx(flops, rel=0.01)), name
        assert row.utilisation == (None if utilisation is None else pytest.approx(utilisation, rel=0.01)), name


def test_a_run_like_the_papers_costs_what_the_paper_says() -> None:
    """CoAtNet-4's images on 512 TPUv3 cores at the row's own share of the peak: both equivalents are 950."""
    row = ROWS["coatnet4-jft300m-224"]
    assert row.utilisation is not None
    seconds = 6.0 * row.multiply_adds * row.images / (P_REF * row.utilisation)
    ledger = Ledger(row.multiply_adds, held(seconds, P_REF), images=row.images)
    assert ledger.core_days_device == pytest.approx(950)
    assert ledger.core_days_flops * U_REF / row.utilisation == pytest.approx(950)
    assert ledger.mfu == pytest.approx(0.301, rel=0.01)


def test_device_days() -> None:
    for name, days in (("NVIDIA A100-SXM4-80GB", 5.07), ("NVIDIA H200", 16.09)):
        assert Ledger(1, held(DAY, peak_of(name))).core_days_device == pytest.approx(days, abs=0.01)


holdings = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(1.0, 1e9), st.floats(0.0, 1.0), st.floats(1.0, 2000.0)), min_size=1
)


@given(st.integers(10**9, 10**12), st.integers(1, 10**10), holdings)
def test_identities(multiply_adds: int, images: int, parts: list[tuple[Holding, float, float, float]]) -> None:
    """E_flop / E_dev = MFU / u_ref, and every figure follows from the JSON, over any mixture of devices and prices."""
    kept = [
        Holding(kind.device, kind.peak, kind.price, kind.currency, kind.watts, kind.meters, seconds,
                seconds * share * watts if kind.meters else 0.0, seconds * share if kind.meters else 0.0)
        for kind, seconds, share, watts in parts
    ]  # fmt: skip
    ledger = Ledger(multiply_adds, kept[-1], kept[:-1], images)
    assert ledger.core_days_device is not None
    assert ledger.mfu is not None
    assert ledger.core_days_flops / ledger.core_days_device == pytest.approx(ledger.mfu / U_REF)
    assert ledger.device_seconds == pytest.approx(sum(one.seconds for one in kept))
    assert ledger.money == pytest.approx(sum(one.seconds / 3600 * (one.price or 0) for one in kept))
    assert ledger.core_days_device == pytest.approx(
        sum(one.seconds * (one.peak or 0) for one in kept) / 86400 / 61.5e12
    )
    again = of_state(json.loads(json.dumps(ledger.state())))
    assert again.metrics() == pytest.approx(ledger.metrics())
    assert 0 <= ledger.energy_measured <= 1


@dataclass
class Life:
    """A run as plain lists of (kind, devices x seconds), beside the clock and the ledger under test."""

    now: int = 0
    spent: list[tuple[int, float]] = field(default_factory=list)
    line: dict[str, Any] | None = None
    saved: tuple[dict[str, Any], dict[str, Any]] | None = None
    seen: list[tuple[int, float]] = field(default_factory=list)
    made: int = 0  # images, whether they count or were lost
    told: int = 0  # of them up to the last line or save

    def start(self, kind: int, world: int) -> None:
        """An attempt on other devices, from the newest save and the last line."""
        self.now += 5 * NS
        self.spent, self.kind, self.world, self.made = list(self.seen), kind, world, self.told
        self.clock = Clock(world, self.now, self.line, now=lambda: self.now)
        one = KINDS[kind]
        self.ledger = Ledger(7, Holding(one.device, one.peak, one.price, one.currency, one.watts, one.meters))
        self.clock.go_on(self.saved[0] if self.saved else None)
        self.ledger.go_on(self.saved[1] if self.saved else None, self.clock.ledger, self.clock.held)
        self.count()
        self.write()

    def count(self) -> None:
        """As `Session.count_time` does."""
        self.ledger.held(self.clock.now())
        self.clock.ledger = json.loads(json.dumps(self.ledger.state()))

    def train(self, seconds: int) -> None:
        """Time passes in a step; the ledger is not told."""
        with self.clock.of("productive"):
            self.now += seconds * NS
        self.spent.append((self.kind, seconds * self.world))
        self.ledger.images += 3  # as `Session.trained` does
        self.clock.ledger["images"] = self.ledger.images
        self.made += 3

    def write(self) -> None:
        """The clock's thread writes; the ledger's state in the line is that of the last count."""
        self.line = json.loads(json.dumps(self.clock.line()))
        self.seen, self.told = list(self.spent), self.made

    def save(self) -> None:
        """A checkpoint."""
        self.count()
        self.saved = self.clock.state(), self.ledger.state()
        self.seen, self.told = list(self.spent), self.made


moves = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 5000)),
    st.tuples(st.sampled_from(["count", "write", "save"])),
    st.tuples(st.just("start"), st.integers(0, len(KINDS) - 1), st.integers(1, 64)),
)


@given(st.lists(moves, max_size=30))
def test_every_device_second_is_paid_once_at_its_own_price(story: list[tuple[Any, ...]]) -> None:
    """Over restarts, other devices and other prices; what passed after the last line of a killed run is not known."""
    life = Life()
    life.start(0, 2)
    for kind, *rest in story:
        getattr(life, kind)(*rest)
    life.count()
    assert life.ledger.images + life.ledger.lost_images == life.made  # each once, also those after the last count
    for number, kind in enumerate(KINDS):
        paid = sum(one.seconds for one in life.ledger.holdings if one.kind == kind.kind)
        assert paid == pytest.approx(sum(seconds for spent, seconds in life.spent if spent == number))
    assert life.ledger.device_seconds == pytest.approx(sum(life.clock.now().devices.values()) / NS)
    money = sum(seconds / HOUR * (KINDS[kind].price or 0) for kind, seconds in life.spent)
    assert (life.ledger.money or 0.0) == pytest.approx(money)


def test_energy_is_measured_then_its_mean_then_an_assumption() -> None:
    assert Ledger(1, held(10.0, watts=700.0, joules=2000.0, measured=5.0)).energy_kwh == pytest.approx(4000 / KWH)
    assert Ledger(1, held(10.0, watts=700.0)).energy_kwh == pytest.approx(7000 / KWH)
    assert Ledger(1, held(10.0)).energy_kwh is None
    both = Ledger(1, held(10.0, watts=700.0), [held(30.0, watts=100.0, joules=300.0, measured=30.0, meters="NVML")])
    assert both.energy_kwh == pytest.approx(7300 / KWH)
    assert both.energy_measured == 0.75


def test_unknown_device_and_price_leave_figures_out() -> None:
    ledger = Ledger(10, held(3600.0, peak_of("abacus")), images=5)
    lost = {"cost/lost_images", "cost/lost_device_hours", "cost/energy_measured"}
    assert set(ledger.metrics()) == {"cost/device_hours", "cost/model_flops", "cost/tpu_v3_core_days_flops"} | lost
    assert ledger.metrics()["cost/model_flops"] == 300
    mixed = Ledger(10, held(60.0, 1e12, price=1.0, currency="EUR"), [held(60.0, 1e12, price=1.0, currency="USD")])
    assert mixed.money is None
    assert mixed.core_days_device is not None


def test_holdings_of_one_kind_are_one_and_the_newest_is_last() -> None:
    one, other = held(1.0, 1e12), held(2.0, 2e12)
    assert merged([one, other, one]) == [held(2.0, 1e12), other]
    assert Ledger(1, held(5.0, 1e12), [one, other]).holdings == [other, held(6.0, 1e12)]


def test_lost_work_is_a_line_of_its_own() -> None:
    """A crash at 80 images, 50 of them saved; the repeated ones count once as images and once as lost."""
    ledger = Ledger(10, Holding(peak=1e12, price=36.0))
    ledger.go_on({"images": 50, "lost_images": 7}, {"images": 80, "lost_images": 7})
    assert (ledger.images, ledger.lost_images) == (50, 37)
    ledger.images = 80
    book = Book(0, 0)
    book.advance("productive", 3 * NS, 4)
    book.advance("lost", 5 * NS, 4)
    book.advance("down", 9 * NS, 0)
    ledger.held(book)
    assert (ledger.device_seconds, ledger.lost_device_seconds) == (20.0, 8.0)
    metrics = ledger.metrics()
    assert metrics["cost/model_flops"] == 6 * 10 * 80
    assert (metrics["cost/lost_images"], metrics["cost/lost_device_hours"]) == (37, 8 / 3600)
    assert ledger.money == pytest.approx(0.2)
    assert ledger.lost_share == 0.4


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA GH200 480GB", 989.4e12),
     ("NVIDIA A10G", 70e12), ("NVIDIA A100-PCIE-40GB", 312e12)],
)  # fmt: skip
def test_peaks_take_the_longest_match(name: str, peak: float) -> None:
    assert peak_of(name) == peak
