"""The bill of a run for people: a table beside the paper's row, and the lines at the end of a run. No torch."""

from typing import NamedTuple

from trainer.cost.bill import Bill, currency, figures
from trainer.cost.ledger import HOUR, U_REF, Ledger
from trainer.cost.paper import Row


class Line(NamedTuple):
    """One line of the table."""

    label: str
    run: str
    paper: str = ""
    ratio: str = ""


def lines(bill: Bill, beside: Row | None) -> list[Line]:
    """The table: the run, the paper's row, and the first over the second."""
    ledger, found = bill.ledger, figures(bill, beside)
    core_days, images, flops, utilisation = "", None, None, None
    if beside is not None:
        core_days, images = f"{beside.core_days:,.0f}", beside.images
        flops, utilisation = beside.model_flops, beside.utilisation
    own = found["tpu_v3_core_days_flops_own_row"]
    by_flops = f"{ledger.core_days_flops:.4g}"
    table = [
        Line("images", f"{ledger.images:,}", *_beside(ledger.images, images, ",.0f")),
        Line("model FLOPs", f"{ledger.model_flops:.4g}", *_beside(ledger.model_flops, flops, ".4g")),
        Line("device-hours", devices(ledger)),
        Line("MFU", share(ledger.mfu), *_beside(ledger.mfu, utilisation, ".1%")),
        Line(f"TPUv3-core-days by FLOPs, at {U_REF:.0%}", by_flops, core_days, ratio(found.get("ratio_flops"))),
    ]
    if isinstance(own, float) and beside is not None and beside.model == bill.model:
        label = f"TPUv3-core-days by FLOPs, at the row's {share(utilisation)}"
        table.append(Line(label, f"{own:.4g}", core_days, ratio(own / beside.core_days)))
    by_time = ledger.core_days_device
    table.append(
        Line("TPUv3-core-days by device time", "unknown" if by_time is None else f"{by_time:.4g}", core_days,
             ratio(found.get("ratio_device")))
    )  # fmt: skip
    table += [Line("energy", energy(ledger)), Line("money", money(ledger))]
    table.append(Line("lost and done again, of the above", lost(ledger)))
    table.append(Line("wall time", f"{bill.wall / HOUR:.4g} h in {bill.attempts} attempt(s), {bill.goodput:.1%} of it "
                      f"productive"))  # fmt: skip
    return table


def text(bill: Bill, beside: Row | None) -> str:
    """The table as lines of text."""
    rows = lines(bill, beside)
    title = beside.title if beside is not None else ""
    head = Line("", bill.name, f"paper: {title}" if title else "", "ratio" if title else "")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(4)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in
             [head, *rows]]  # fmt: skip
    return "\n".join([f"{bill.model} at {bill.resolution} px, {bill.recipe or 'no recipe'}", *shown])


def summary(ledger: Ledger) -> str:
    """Lines for the end of a run."""
    found = [
        f"images {ledger.images:,}   model FLOPs {ledger.model_flops:.4g}   device-hours "
        f"{ledger.device_seconds / HOUR:.4f}",
        f"TPUv3-core-days: {ledger.core_days_flops:.4g} by FLOPs at {U_REF:.0%} of peak",
    ]
    if ledger.core_days_device is not None and ledger.mfu is not None:
        found[1] += f", {ledger.core_days_device:.4g} by device time; MFU {ledger.mfu:.1%}"
    else:
        found[1] += "; MFU and device-time equivalent unknown: this device's peak is not in the table"
    spent = [f"energy {energy(ledger)}"] + ([f"money {money(ledger)}"] if ledger.money is not None else [])
    found.append("   ".join(spent))
    if ledger.lost_images or ledger.lost_device_seconds:
        found.append(f"lost and done again: {lost(ledger)}")
    return "\n".join(found)


def devices(ledger: Ledger) -> str:
    """Device-hours, and of which devices."""
    kinds = ", ".join(f"{one.seconds / HOUR:.4g} {one.device or 'of unknown devices'}" for one in ledger.holdings)
    return f"{ledger.device_seconds / HOUR:.4g}" + (f" ({kinds})" if kinds else "")


def energy(ledger: Ledger) -> str:
    """Kilowatt-hours, and whether they were measured."""
    if ledger.energy_kwh is None:
        return "unknown: not measured, and this device's power is not in the table (cluster.watts)"
    meters = " and ".join(sorted({one.meters for one in ledger.holdings if one.measured}))
    watts = ", ".join(sorted({f"{one.watts:g} W" for one in ledger.holdings if one.watts and not one.measured}))
    measured = ledger.energy_measured
    if not measured:
        return f"{kilowatt_hours(ledger.energy_kwh)} (estimate: {watts or 'no device'} a device)"
    rest = f", the rest at {watts or 'its mean'}" if measured < 0.995 else ""
    return f"{kilowatt_hours(ledger.energy_kwh)} ({measured:.0%} of the time measured by {meters}{rest})"


def kilowatt_hours(value: float) -> str:
    """An energy in kWh, little of it in Wh, much in MWh."""
    if value >= 10_000:
        return f"{value / 1000:.4g} MWh"
    return f"{value:.4g} kWh" if value >= 0.01 or not value else f"{value * 1000:.3g} Wh"


def money(ledger: Ledger) -> str:
    """Money, and at which prices."""
    if ledger.money is None:
        return "unknown: no price, or several currencies (cluster.price, per device-hour)"
    prices = ", ".join(sorted({f"{one.price:g}" for one in ledger.holdings if one.price is not None}))
    return f"{amount(ledger.money)} {currency(ledger)} (at {prices} a device-hour)"


def amount(value: float) -> str:
    """Money in whole hundredths, less of it in more digits."""
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.2g}"


def lost(ledger: Ledger) -> str:
    """Work that was done twice; its energy and money are its share of the time."""
    parts = [f"{ledger.lost_images:,} images", f"{ledger.lost_device_seconds / HOUR:.4g} device-hours"]
    if ledger.money is not None:
        parts.append(f"{amount(ledger.money * ledger.lost_share)} {currency(ledger)}")
    return ", ".join(parts)


def share(value: float | None) -> str:
    """As a percentage."""
    return "unknown" if value is None else f"{value:.1%}"


def ratio(value: object) -> str:
    """As a factor; empty where there is none."""
    return f"{value:.4g}" if isinstance(value, float) else ""


def _beside(ours: float | None, paper: float | None, form: str) -> tuple[str, str]:
    """The paper's figure and ours over it, empty where it has none."""
    if not paper:
        return "", ""
    return format(paper, form), "" if ours is None else ratio(ours / paper)
