"""What a run cost so far, from its folder, beside a row of the paper's table 5. No torch.

All figures follow from a small JSON document, `facts`: the ledger's state in the last line of `events/clock.jsonl`,
with the network's name. `coatnet cost` takes such a document as well as a run folder, and computes them anew.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs import resolve
from configs.errors import InputError
from trainer.cost.ledger import DAY, HOUR, P_REF, U_REF, Ledger, of_state
from trainer.cost.paper import Row, row, row_of
from trainer.health import goodput
from trainer.health.goodput import CLASSES, NS, Book, Class

FORMAT = 1


@dataclass(frozen=True)
class Bill:
    """What is known of a run's cost.

    Attributes:
        name: of the run.
        model: a name of `coatnet models`.
        resolution: pixels.
        ledger: all sums.
        seconds: wall time by class of `trainer.health.goodput`.
        attempts: starts of the run.
        recipe: the run's.
    """

    name: str
    model: str
    resolution: int
    ledger: Ledger
    seconds: dict[Class, float]
    attempts: int
    recipe: str = ""

    @property
    def wall(self) -> float:
        """Seconds since the first start."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Productive share of the wall time."""
        return self.seconds["productive"] / self.wall if self.wall else 0.0

    def facts(self) -> dict[str, Any]:
        """The small document that everything follows from."""
        return {
            "format": FORMAT,
            "name": self.name,
            "recipe": self.recipe,
            "model": self.model,
            "resolution": self.resolution,
            "ledger": self.ledger.state(),
            "seconds": self.seconds,
            "attempts": self.attempts,
        }


def of_paths(paths: Sequence[Path]) -> list[Bill]:
    """The bills of run folders, and of documents that `coatnet cost --json` printed, which may have several.

    Raises:
        InputError: see `of_path`.
    """
    return [found for path in paths for found in (_of_document(path) if path.is_file() else [of_path(path)])]


def of_path(path: Path) -> Bill:
    """The bill of a run folder.

    Raises:
        InputError: it is none, or the run has not begun.
    """
    if not path.exists():
        raise InputError(f"{path}: no run folder and no file; `coatnet train` makes run folders under runs/")
    run = resolve.recorded(path / "run.json")
    last = goodput.last_line(path / "events" / goodput.FILE)
    if last is None or "multiply_adds" not in last.get("ledger", {}):
        raise InputError(f"{path}: no device time was written down yet (events/{goodput.FILE}); the run has not begun")
    book = Book.of(last)
    ledger = of_state(last["ledger"], sum(book.devices.values()) / NS)
    ledger.lost_device_seconds = book.devices["lost"] / NS
    seconds = {name: book.spent[name] / NS for name in CLASSES}
    return Bill(path.resolve().name, run.model.name, run.model.resolution, ledger, seconds, book.attempts, run.recipe)


def _of_document(path: Path) -> list[Bill]:
    """The bills in a JSON file.

    Raises:
        InputError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        each = content if isinstance(content, list) else [content]
        return [_of_facts(found.get("facts", found), path) for found in each]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a document of `coatnet cost --json` ({error!r})") from None


def _of_facts(facts: dict[str, Any], path: Path) -> Bill:
    """The bill that follows from the facts of a document.

    Raises:
        InputError: they are of another format.
    """
    if facts["format"] != FORMAT:
        raise InputError(f"{path}: has format {facts['format']}, this program reads {FORMAT}")
    seconds = {name: float(facts["seconds"][name]) for name in CLASSES}
    place = (str(facts["name"]), str(facts["model"]), int(facts["resolution"]))
    return Bill(*place, of_state(facts["ledger"]), seconds, int(facts["attempts"]), str(facts["recipe"]))


def against(bill: Bill, name: str = "") -> Row | None:
    """The row of the paper to compare with: the named one, else that of the run's own model, None if there is none.

    Raises:
        InputError: no row of that name.
    """
    return row(name) if name else row_of(bill.model)


def figures(bill: Bill, beside: Row | None) -> dict[str, float | str | None]:
    """Every figure, by name; None where it is not known."""
    ledger = bill.ledger
    own = row_of(bill.model)
    values: dict[str, float | str | None] = {
        "images": ledger.images,
        "model_flops": ledger.model_flops,
        "device_hours": ledger.device_seconds / HOUR,
        "mfu": ledger.mfu,
        "tpu_v3_core_days_flops": ledger.core_days_flops,
        "tpu_v3_core_days_flops_own_row": at_utilisation(ledger, own),
        "tpu_v3_core_days_device": ledger.core_days_device,
        "energy_kwh": ledger.energy_kwh,
        "energy_measured": ledger.energy_measured,
        "money": ledger.money,
        "currency": currency(ledger),
        "lost_images": ledger.lost_images,
        "lost_device_hours": ledger.lost_device_seconds / HOUR,
        "lost_money": None if ledger.money is None else ledger.money * ledger.lost_share,
        "lost_energy_kwh": None if ledger.energy_kwh is None else ledger.energy_kwh * ledger.lost_share,
        "goodput": bill.goodput,
        "wall_hours": bill.wall / HOUR,
    }
    if beside is not None:
        values["against"] = beside.name
        values["ratio_flops"] = ledger.core_days_flops / beside.core_days
        device = ledger.core_days_device
        values["ratio_device"] = None if device is None else device / beside.core_days
    return values


def at_utilisation(ledger: Ledger, own: Row | None) -> float | None:
    """E_flop at the utilisation of the model's own row, None where the paper's is not known."""
    if own is None or own.utilisation is None:
        return None
    return ledger.model_flops / (DAY * P_REF * own.utilisation)


def currency(ledger: Ledger) -> str:
    """Of the money; empty where there is none."""
    return next((one.currency for one in ledger.holdings if one.price is not None), "")


def document(bill: Bill, beside: Row | None) -> dict[str, Any]:
    """For programs: the facts, the figures that follow, and the paper's row."""
    constants = {"p_ref": P_REF, "u_ref": U_REF}
    paper = None if beside is None else {**asdict(beside), "model_flops": beside.model_flops,
                                         "utilisation": beside.utilisation}  # fmt: skip
    return {"facts": bill.facts(), "constants": constants, "figures": figures(bill, beside), "paper": paper}
