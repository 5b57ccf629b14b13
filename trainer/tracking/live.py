"""What a run is doing, in a few lines for a terminal, read from its folder by whoever watches. No torch.

`facts` gives the figures, `lines` the text that `coatnet status --watch` can show for a run.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import resolve
from configs.duration import clock
from configs.errors import InputError
from trainer.cost import bill
from trainer.cost.bill import Bill
from trainer.cost.statement import amount
from trainer.tracking import data_card

TAIL = 1 << 18  # bytes of metrics.jsonl that are read: a few hundred lines
BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # an eighth to eight eighths of a character
WIDTH = 32  # characters of a sparkline
SILENT = 120.0  # seconds without a line of figures that are worth a word


@dataclass(frozen=True)
class Live:
    """One run at this moment; None is what is not known.

    Attributes:
        losses: of the last lines, oldest first.
        left: seconds until the last step, at the rate of the last lines.
        silent: seconds since the last line of figures.
        cost: money so far; with it its currency.
    """

    name: str
    step: int
    steps: int | None
    losses: tuple[float, ...]
    rate: float | None
    mfu: float | None
    goodput: float | None
    left: float | None
    silent: float | None
    device_hours: float | None
    core_days: float | None
    cost: float | None
    currency: str
    done: bool


def facts(folder: Path, now: float | None = None) -> Live:
    """What the folder of a run says.

    Args:
        folder: of the run.
        now: unix time; None: this moment.

    Raises:
        InputError: the folder has no run.json that can be read.
    """
    run = resolve.recorded(folder / "run.json")
    rows, spent, data = last_rows(folder / "metrics.jsonl"), _bill(folder), data_card.read(folder)
    train = [row for row in rows if "train/loss" in row or "perf/images_per_second" in row]
    steps = (
        resolve.total_steps(run, data["splits"]["train"]["samples"]) if data is not None else run.optim.steps or None
    )
    if steps is not None and run.steps:
        steps = min(steps, run.steps)
    step = int(train[-1]["step"]) if train else 0
    pace, done = _pace(train[_last_start(train) :]), (folder / "done").exists()
    ledger = spent.ledger if spent is not None else None
    last = train[-1] if train else {}
    return Live(
        name=folder.resolve().name,
        step=step,
        steps=steps,
        losses=tuple(float(row["train/loss"]) for row in _standing(train) if "train/loss" in row),
        rate=last.get("perf/images_per_second"),
        mfu=last.get("perf/mfu"),
        goodput=spent.goodput if spent is not None else None,
        left=0.0 if done else (steps - step) * pace if steps is not None and pace is not None else None,
        silent=(now or time.time()) - rows[-1]["time"] if rows else None,
        device_hours=ledger.device_seconds / 3600 if ledger is not None else None,
        core_days=ledger.core_days_flops if ledger is not None else None,
        cost=ledger.money if ledger is not None else None,
        currency=bill.currency(ledger) if ledger is not None else "",
        done=done,
    )


def lines(folder: Path, now: float | None = None) -> list[str]:
    """Text for a terminal: where the run is, its loss as a curve, its speed, and what it cost so far.

    Raises:
        InputError: see `facts`.
    """
    live = facts(folder, now)
    place = f"step {live.step:,}" + (f" of {live.steps:,} ({live.step / live.steps:.0%})" if live.steps else "")
    end = "finished" if live.done else f"ETA {clock(live.left)}" if live.left is not None else ""
    told = [f"{live.name}: {', '.join(filter(None, (place, end)))}"]
    if live.losses:
        told.append(f"  loss {live.losses[-1]:.4f} {sparkline(live.losses)}")
    told += [f"  {text}" for text in (speed(live.rate, live.mfu, live.goodput), spent_so_far(live)) if text]
    if live.silent is not None and live.silent > SILENT and not live.done:
        told.append(f"  no figures for {clock(live.silent)}")
    return told


def speed(rate: float | None, mfu: float | None, goodput: float | None) -> str:
    """Images a second, MFU, goodput: what is known of them."""
    parts = [f"{rate:,.1f} images/s"] if rate is not None else []
    parts += [f"MFU {mfu:.1%}"] if mfu is not None else []
    parts += [f"goodput {goodput:.1%}"] if goodput is not None else []
    return "  ".join(parts)


def spent_so_far(live: Live) -> str:
    """Device-hours, TPUv3-core-days and money so far."""
    parts = [f"{live.device_hours:,.3g} device-hours"] if live.device_hours is not None else []
    parts += [f"{live.core_days:.3g} TPUv3-core-days"] if live.core_days is not None else []
    parts += [f"{amount(live.cost)} {live.currency}"] if live.cost is not None else []
    return "  ".join(parts)


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Numbers as a curve of so many characters: the mean of neighbours, a space where none of them is finite."""
    size = -(-len(values) // width)
    means = []
    for first in range(0, len(values), size or 1):
        part = [value for value in values[first : first + size] if abs(value) < float("inf")]
        means.append(sum(part) / len(part) if part else None)
    known = [mean for mean in means if mean is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    scale = len(BLOCKS) - 1
    return "".join(" " if mean is None else BLOCKS[round((mean - low) / span * scale)] for mean in means)


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file of JSON lines, TAIL bytes of it at most; what is half written is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        cut = file.tell() > 0
        rows = file.read().split(b"\n")
    return [json.loads(row) for row in rows[cut:-1]]


def _standing(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of steps that the run still has: what was made again counts once, as it came out last."""
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _last_start(rows: Sequence[Mapping[str, Any]]) -> int:
    """The first row behind the last place at which the steps went back."""
    for number in range(len(rows) - 1, 0, -1):
        if rows[number]["step"] <= rows[number - 1]["step"]:
            return number
    return 0


def _pace(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds a step over the last lines, with the saves and evaluations between them."""
    if len(rows) < 2 or rows[-1]["step"] == rows[0]["step"]:
        return None
    seconds, steps = float(rows[-1]["time"]) - float(rows[0]["time"]), int(rows[-1]["step"]) - int(rows[0]["step"])
    return seconds / steps


def _bill(folder: Path) -> Bill | None:
    """What it cost so far, None where nothing was written down yet."""
    try:
        return bill.of_path(folder)
    except InputError:
        return None
