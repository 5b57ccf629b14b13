"""A scale study: the best layout at every number of devices, how much of them is left, and where more stops paying.

Strong scaling: the recipe as it is on more devices. Weak: the global batch grows with them, which changes the
mathematics and is a study only. Efficiency is images/s for each device beside that of the fewest devices that fit. The
knee is the largest number whose run costs at most `DEARER` times the device-hours of the cheapest. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.errors import InputError
from trainer.cost.ledger import HOUR
from trainer.planning import table
from trainer.planning.answer import foretold, mfu, smallest
from trainer.planning.choose import Candidate, Planner
from trainer.planning.outlook import Job, Outlook
from trainer.report.chart import Curve, Look, curves
from trainer.report.scale import percent, short
from trainer.report.write import alone

DEARER = 1.25


@dataclass(frozen=True)
class Point:
    """One number of devices.

    Attributes:
        best: the fastest layout of the recipe that fits and the whole run with it; None: nothing fits.
        efficiency: of strong scaling; None as above.
        weak: of weak scaling; None where nothing fits, or the batch cannot grow so.
    """

    devices: int
    best: tuple[Candidate, Outlook] | None
    efficiency: float | None
    weak: float | None

    @property
    def hours(self) -> float | None:
        """Device-hours of the run."""
        return self.best[1].ledger.device_seconds / HOUR if self.best is not None else None


@dataclass(frozen=True)
class Study:
    """All points, by devices, and the knee among them."""

    points: tuple[Point, ...]
    knee: int


def study(planner: Planner, job: Job, counts: Sequence[int]) -> Study:
    """The study at these numbers of devices, ascending.

    Raises:
        InputError: nothing fits at any of them, with the smallest number of such devices on which something would.
    """
    found: list[Point] = []
    first: tuple[int, float] | None = None  # devices, images/s for each
    weak_first: float | None = None
    for count in counts:
        here = planner.on(count)
        best = here.best()
        if best is None:
            found.append(Point(count, None, None, None))
            continue
        outlook = foretold(here, job, best)
        each = outlook.images_per_second / count
        first = first or (count, each)
        batch, left = divmod(job.batch * count, first[0])
        weak = _each(planner.on(count, batch), job, batch) if not left else None
        weak_first = weak_first or weak
        of_weak = weak / weak_first if weak is not None and weak_first is not None else None
        found.append(Point(count, (best, outlook), each / first[1], of_weak))
    hours = [point.hours for point in found if point.hours is not None]
    if not hours:
        raise InputError(
            f"{planner.run.model.name}: no layout fits {planner.machines.device.name} at any of "
            f"{', '.join(map(str, counts))} devices; the smallest cluster of such devices that would: "
            f"{smallest(planner)}; ask for the largest of these numbers alone to see why"
        )
    knee = max(point.devices for point in found if point.hours is not None and point.hours <= DEARER * min(hours))
    return Study(tuple(found), knee)


def _each(planner: Planner, job: Job, batch: int) -> float | None:
    """Images/s for each device at another global batch, at best; None if nothing fits."""
    best = planner.best()
    if best is None:
        return None
    found = foretold(planner, replace(job, batch=batch), best)
    return found.images_per_second / planner.machines.devices


def text(given: Study) -> str:
    """The study as a table."""
    rows: list[tuple[str, ...]] = [("devices", "strong", "weak", "images/s", "MFU", "days", *table.SPENT, "", "layout")]
    for point in given.points:
        if point.best is None:
            rows.append((f"{point.devices:,}", *["-"] * 10, "", "nothing fits"))
            continue
        one, run = point.best
        rows.append((
            f"{point.devices:,}", table.share(point.efficiency), table.share(point.weak),
            f"{run.images_per_second:,.5g}", table.share(mfu(run)), f"{run.days:,.3g}", *table.spent(run),
            "<- knee" if point.devices == given.knee else "", one.words(),
        ))  # fmt: skip
    told = (
        f"strong: the recipe as it is; weak: the global batch grows with the devices. knee: {given.knee:,} devices, "
        f"the most whose run takes at most {DEARER:g}x the device-hours of the cheapest"
    )
    return f"{table.columns(rows, (11, 12))}\n\n{told}\n{table.CORE_DAYS}"


def document(given: Study) -> dict[str, Any]:
    """The study as JSON."""
    rows = []
    for point in given.points:
        row: dict[str, Any] = {"devices": point.devices, "strong": point.efficiency, "weak": point.weak}
        if point.best is not None:
            one, run = point.best
            row |= {
                "layout": one.words(), "images_per_second": run.images_per_second, "mfu": mfu(run), "days": run.days,
                "device_hours": point.hours, "tpu_v3_core_days_flops": run.ledger.core_days_flops,
                "tpu_v3_core_days_device": run.ledger.core_days_device, "energy_kwh": run.ledger.energy_kwh,
                "money": run.ledger.money,
            }  # fmt: skip
        rows.append(row)
    return {"points": rows, "knee": given.knee}


def picture(given: Study) -> str:
    """The curves as one SVG that stands alone: efficiency over devices, device-hours over days."""
    fitting = [point for point in given.points if point.best is not None]

    def over(values: Sequence[float | None]) -> list[tuple[float, float]]:
        return [(float(place), value) for place, value in enumerate(values) if value is not None]

    def devices(place: float) -> str:
        return f"{fitting[round(place)].devices:,}" if 0 <= round(place) < len(fitting) else ""

    strong, weak = over([point.efficiency for point in fitting]), over([point.weak for point in fitting])
    look = Look(x="efficiency over devices", y="efficiency", show_x=devices, show_y=percent, zero=True, dots=True)
    cost = sorted((point.best[1].days, point.hours or 0.0) for point in fitting if point.best is not None)
    against = Look(x="device-hours over days", y="device-hours", show_y=short, dots=True)
    return alone([curves([Curve("strong", strong), Curve("weak", weak)], look), curves([Curve("cost", cost)], against)])
