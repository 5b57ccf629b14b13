"""What a run cost: model FLOPs, device-hours, TPUv3-core-days (COATNET.md section 5), energy and money. No torch.

Device time is kept in holdings, one for each kind of device and price the run had, so that figures stay right when a
run moves to other machines or prices change: E_dev and the MFU weigh every device-second by that device's peak.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trainer.health.goodput import NS, Book

P_REF = 61.5e12  # FLOP/s of one TPUv3 core in bf16: 123e12 a chip, two cores a chip
U_REF = 0.30  # share of P_REF that the paper's runs reached (29.8 %, 30.1 %, 37.0 %), one value so that runs compare
DAY = 86400.0
HOUR = 3600.0
KWH = 3.6e6  # joules

State = Mapping[str, Any]


@dataclass
class Holding:
    """Devices of one kind, at one price, and how long the run held them.

    Attributes:
        device: what it calls itself.
        peak: dense bf16 FLOP/s of one, None where unknown.
        price: money for one device-hour, None where nobody said.
        currency: of the price.
        watts: assumed of one where nothing measures, None where nothing is known.
        meters: what measured, "NVML" or "RAPL" for example; empty: nothing.
        seconds: device-seconds.
        joules: as measured.
        measured: those of `seconds` that `joules` are of.
    """

    device: str = ""
    peak: float | None = None
    price: float | None = None
    currency: str = ""
    watts: float | None = None
    meters: str = ""
    seconds: float = 0.0
    joules: float = 0.0
    measured: float = 0.0

    @property
    def energy(self) -> float | None:
        """Joules: what was measured, and for the rest of the time its mean or else the assumed power."""
        rest = self.seconds - self.measured
        if rest <= 0:
            return self.joules
        rate = self.joules / self.measured if self.measured > 0 else self.watts
        return None if rate is None else self.joules + rest * rate

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two holdings that can be one line have in common."""
        return self.device, self.peak, self.price, self.currency, self.watts, self.meters


@dataclass
class Ledger:
    """Sums over the life of a run, carried in its checkpoints and in the lines of `trainer.health.goodput`.

    Attributes:
        multiply_adds: of one image's forward pass.
        now: what this attempt holds.
        before: what earlier attempts held, one line for each kind.
        images: trained on, each once: of the updates that the run has.
        lost_images: trained on for updates that a crash or a rollback undid; not among `images`.
        lost_device_seconds: those of `device_seconds` that went into them.
    """

    multiply_adds: int
    now: Holding = field(default_factory=Holding)
    before: list[Holding] = field(default_factory=list)
    images: int = 0
    lost_images: int = 0
    lost_device_seconds: float = 0.0

    @property
    def holdings(self) -> list[Holding]:
        """All of them, those of one kind as one, this attempt's last."""
        return merged([self.now, *reversed(self.before)])[::-1]

    @property
    def device_seconds(self) -> float:
        """Devices times seconds held, all of them, also for work that was lost."""
        return sum(one.seconds for one in self.before) + self.now.seconds

    @property
    def model_flops(self) -> float:
        """F = 6 M N: two FLOPs per multiply-add, backward twice the forward; nothing for recomputation."""
        return 6.0 * self.multiply_adds * self.images

    @property
    def possible_flops(self) -> float | None:
        """What the devices could have done in the time they were held; None if one of them is unknown."""
        held = [one for one in self.holdings if one.seconds > 0]
        parts = [one.seconds * one.peak for one in held if one.peak is not None]
        return sum(parts) if len(parts) == len(held) else None

    @property
    def core_days_flops(self) -> float:
        """What the same work costs on TPUv3 at the paper's utilisation: F / (86400 P_ref u_ref)."""
        return self.model_flops / (DAY * P_REF * U_REF)

    @property
    def core_days_device(self) -> float | None:
        """The device time in TPUv3 cores of equal peak: (G T / 86400) (P_gpu / P_ref); None for an unknown device."""
        possible = self.possible_flops
        return None if possible is None else possible / (DAY * P_REF)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the devices could have done in the time they were held."""
        possible = self.possible_flops
        return self.model_flops / possible if possible else None

    @property
    def energy_kwh(self) -> float | None:
        """Of the devices; None if of some time neither a measurement nor an assumption is there."""
        parts = [one.energy for one in self.holdings if one.seconds > 0]
        known = [part for part in parts if part is not None]
        return sum(known) / KWH if len(known) == len(parts) else None

    @property
    def energy_measured(self) -> float:
        """Share of the device time of which the energy was measured."""
        return (
            min(1.0, sum(one.measured for one in self.holdings) / self.device_seconds) if self.device_seconds else 0.0
        )

    @property
    def money(self) -> float | None:
        """Price times device-hours; None if a price is missing, or prices are in several currencies."""
        held = [one for one in self.holdings if one.seconds > 0]
        parts = [one.seconds / HOUR * one.price for one in held if one.price is not None]
        return sum(parts) if len(parts) == len(held) and len({one.currency for one in held}) <= 1 else None

    @property
    def lost_share(self) -> float:
        """Share of the device time that went into work which was lost; of energy and money it is the same."""
        return self.lost_device_seconds / self.device_seconds if self.device_seconds else 0.0

    def metrics(self) -> dict[str, float]:
        """The ledger under the names of DESIGN.md; figures that are not known are left out."""
        values = {
            "cost/device_hours": self.device_seconds / HOUR,
            "cost/model_flops": self.model_flops,
            "cost/tpu_v3_core_days_flops": self.core_days_flops,
            "cost/tpu_v3_core_days_device": self.core_days_device,
            "cost/energy_kwh": self.energy_kwh,
            "cost/energy_measured": self.energy_measured,
            "cost/money": self.money,
            "cost/lost_images": float(self.lost_images),
            "cost/lost_device_hours": self.lost_device_seconds / HOUR,
        }
        return {name: value for name, value in values.items() if value is not None}

    def held(self, book: Book) -> None:
        """Take the device time from the sums of wall time, which count it by class."""
        self.now.seconds += max(0.0, sum(book.devices.values()) / NS - self.device_seconds)
        self.lost_device_seconds = book.devices["lost"] / NS

    def measured(self, joules: float, seconds: float) -> None:
        """The devices of this attempt took so many joules in so many device-seconds of it."""
        self.now.joules, self.now.measured = joules, seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, and the lines of `trainer.health.goodput`: all that every figure follows from."""
        return {
            "multiply_adds": self.multiply_adds,
            "images": self.images,
            "lost_images": self.lost_images,
            "lost_device_seconds": self.lost_device_seconds,
            "holdings": [asdict(one) for one in self.holdings],
        }

    def go_on(self, saved: State | None, last: State, held: float = 0.0) -> None:
        """The run goes on from a checkpoint, or from nothing: what was trained on since then is lost.

        Args:
            saved: the checkpoint's `state`.
            last: the state when the run broke off; empty where nobody knows more than the checkpoint.
            held: device-seconds when it broke off, some after `last` was taken.
        """
        images = int(saved["images"]) if saved else 0
        known = [state for state in (saved, last) if state]
        # Images trained on, lost or not, only grow: whichever state has more of them is the newer one.
        trained = (int(state.get("images", 0)) + int(state.get("lost_images", 0)) for state in known)
        self.lost_images = max(trained, default=images) - images
        self.images = images
        if self.device_seconds:  # a rollback: what is held stays held
            return
        # Either may know more: a run that broke off held devices after its last save, and its lines can be lost.
        newest: State = max(reversed(known), key=lambda state: _seconds(holdings_of(state)), default={})
        self.before = holdings_of(newest, held)


def of_state(state: State, held: float = 0.0) -> Ledger:
    """The ledger that `state` gave, for its figures.

    Args:
        held: device-seconds by now, some after it was taken.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    ledger = Ledger(int(state["multiply_adds"]), Holding(), holdings_of(state, held), int(state["images"]))
    ledger.lost_images = int(state["lost_images"])
    ledger.lost_device_seconds = float(state["lost_device_seconds"])
    return ledger


def holdings_of(state: State, held: float = 0.0) -> list[Holding]:
    """The holdings in a state, the last of them up to `held` device-seconds of all."""
    found = [Holding(**one) for one in state.get("holdings", ())]
    if found:
        found[-1].seconds += max(0.0, held - _seconds(found))
    return found


def merged(holdings: Iterable[Holding]) -> list[Holding]:
    """Holdings of one kind as one, in the order of their first; one that says nothing is left out."""
    found: list[Holding] = []
    for one in holdings:
        same = next((other for other in found if other.kind == one.kind), None)
        if same is not None:
            same.seconds, same.joules = same.seconds + one.seconds, same.joules + one.joules
            same.measured += one.measured
        elif one != Holding():
            found.append(replace(one))
    return found


def _seconds(holdings: list[Holding]) -> float:
    """Device-seconds of all."""
    return sum(one.seconds for one in holdings)
