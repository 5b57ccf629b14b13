"""A plan for people: aligned columns. No torch."""

from collections.abc import Sequence

from trainer.cost.ledger import DAY, HOUR, U_REF
from trainer.planning.answer import Answer, mfu
from trainer.planning.choose import Candidate
from trainer.planning.data_set import Size
from trainer.planning.outlook import Job, Outlook

SPENT = ("device-hours", "E_flop", "E_dev", "MWh", "money")
HEAD = ("", "layout", "GB a rank", "s a step", "images/s", "MFU", "days", *SPENT)
# Of both tables, and in the words of `coatnet cost`.
CORE_DAYS = (
    f"E_flop: TPUv3-core-days by FLOPs, what the model's FLOPs take at {U_REF:.0%} of a core's peak in any layout\n"
    f"E_dev:  TPUv3-core-days by device time, the devices as cores of equal peak; E_flop / E_dev = MFU of all the time "
    f"they are held / {U_REF:.0%}"
)


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0, 1)) -> str:
    """Rows with their cells aligned, those of the columns `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def text(given: Answer, job: Job, size: Size, origin: str) -> str:
    """The whole answer."""
    machines = given.machines
    rows = [HEAD, *(_row(str(place), *pair) for place, pair in enumerate(given.best, 1))]
    if given.pinned is not None:
        rows.append(_row("own", *given.pinned))
    best, run = given.best[0]
    parts = [
        f"{machines}: {machines.available / 1e9:.1f} GB a rank; {machines.device.source}",
        f"{job.parameters:,} parameters, {job.steps:,} steps of {job.batch:,} pictures; {size.samples:,} samples, "
        f"{size.classes:,} classes ({size.origin})",
        f"speed: {origin}; {given.count:,} layouts looked at",
        "",
        columns(rows),
        "",
        seconds(best),
        bytes_of(best),
        failures(run),
    ]
    if given.pinned is None:
        parts.append(f"the run's own layout: {given.why}")
    parts += ["", "with other settings, at best:", columns(given.others, (0, 1))]
    parts += [
        "",
        CORE_DAYS,
        "MWh:    devices at full power; all of it estimates",
    ]
    return "\n".join(parts)


def _row(place: str, one: Candidate, run: Outlook) -> tuple[str, ...]:
    """One layout."""
    return (
        place,
        one.words(),
        f"{one.memory.total / 1e9:.1f}",
        f"{run.step:.4g}",
        f"{run.images_per_second:,.4g}",
        share(mfu(run)),
        f"{run.days:,.3g}",
        *spent(run),
    )


def spent(run: Outlook) -> tuple[str, ...]:
    """What the run takes, under the heads of `SPENT`."""
    ledger = run.ledger
    return (
        f"{ledger.device_seconds / HOUR:,.4g}",
        f"{ledger.core_days_flops:,.4g}",
        "-" if ledger.core_days_device is None else f"{ledger.core_days_device:,.4g}",
        number(ledger.energy_kwh, 1e3),
        money(run),
    )


def share(value: float | None) -> str:
    """In percent; a dash where nobody knows."""
    return "-" if value is None else f"{value:.1%}"


def number(value: float | None, unit: float) -> str:
    """In units; a dash where nobody knows."""
    return "-" if value is None else f"{value / unit:,.3g}"


def money(run: Outlook) -> str:
    """What the devices cost; a dash without a price."""
    spent = run.ledger.money
    return "-" if spent is None else f"{spent:,.0f} {run.ledger.now.currency}"


def seconds(one: Candidate) -> str:
    """What the step goes to."""
    time = one.time
    assert time is not None
    named = {
        "compute": time.compute, "made again": time.again, "bubble": time.bubble, "traffic": time.exposed,
        "update": time.update, "all else": time.rest,
    }  # fmt: skip
    shown = ", ".join(
        f"{name} {value / time.total:.0%}" for name, value in named.items() if value / time.total >= 0.005
    )
    # The end of a step is that of the stage whose end is longest; all traffic is that of the stage that decides.
    share_hidden = max(0.0, 1 - time.exposed / time.traffic) if time.traffic > 0 else 0.0
    hidden = f"; {share_hidden:.0%} of the traffic is hidden" if time.traffic > 0 else ""
    return f"the step of 1: {shown}{hidden}"


def bytes_of(one: Candidate) -> str:
    """What the memory goes to."""
    return f"its memory in GB: {one.memory}"


def failures(run: Outlook) -> str:
    """What breaks, and how often to save."""
    each = run.interval / run.step
    return (
        f"failures to expect: {run.failures:.2g} in {run.seconds / DAY:.3g} days; a save every {each:,.0f} steps "
        f"({run.interval / 60:.3g} min); {run.ratio:.1%} of the time trains"
    )
