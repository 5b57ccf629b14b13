"""Several runs beside each other: what differs in their settings, how they learned, what they cost and reached."""

from collections.abc import Callable, Sequence

from configs import resolve
from trainer.cost.ledger import Ledger
from trainer.report import chart, scale
from trainer.report.chart import Curve, Look
from trainer.report.gather import HOUR, OWN, Facts, clock_of
from trainer.report.parts import Html, card, grid, paragraph, section, table
from trainer.report.sections import SCORES

Figure = Callable[[Facts], str]


def names(given: Sequence[Facts]) -> list[str]:
    """A name for each, with its folder where two have the same."""
    plain = [facts.name for facts in given]
    return [str(facts.folder) if plain.count(facts.name) > 1 else facts.name for facts in given]


def page(given: Sequence[Facts], named: Sequence[str]) -> Html:
    """All of it."""
    return Html("".join((results(given, named), settings(given, named), curves(given, named))))


def results(given: Sequence[Facts], named: Sequence[str]) -> Html:
    """A column for each run: what it reached and what it cost."""
    head, body = result_rows(given, named)
    turned = [[name, *(row[column] for row in body)] for column, name in enumerate(head) if column]
    return section("Results and cost", card("", table(["", *named], turned, numbers=range(1, len(named) + 1))))


def result_rows(given: Sequence[Facts], named: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a row for each run; figures that no run has are left out."""
    rows = [[name, *(show(facts) for show in FIGURES.values())] for name, facts in zip(named, given, strict=True)]
    kept = [column for column in range(len(FIGURES)) if any(row[column + 1] for row in rows)]
    head = ["run", *(list(FIGURES)[column] for column in kept)]
    return head, [[row[0], *(row[column + 1] or "-" for column in kept)] for row in rows]


def settings(given: Sequence[Facts], named: Sequence[str]) -> Html:
    """The settings in which not all are alike."""
    flat = [resolve.flat(facts.run) for facts in given]
    rows = [
        [key, *(str(one[key]) for one in flat)]
        for key in flat[0]
        if key not in OWN and len({str(one[key]) for one in flat}) > 1
    ]
    if not rows:
        return section("Settings", paragraph("All settings are equal.", "soft"))
    return section("Settings that differ", card("", table(["setting", *named], rows, code=range(len(named) + 1))))


def curves(given: Sequence[Facts], named: Sequence[str]) -> Html:
    """The same figure of all runs in one chart."""
    clock = clock_of(given)

    def over(key: str, look: Look) -> str:
        """One chart, over the steps or over time."""
        lines = [
            Curve(name, clock.points(facts, key) if look.x == clock.label else facts.over_steps(key))
            for name, facts in zip(named, given, strict=True)
        ]
        return chart.curves(lines, look)

    cards = [card("Training loss by step", over("train/loss", Look(y="loss", log=True)))]
    score = next((key for key in ("eval/map", "eval/top1") if any(facts.over_steps(key) for facts in given)), "")
    if score:
        title = f"Held-out {SCORES[score.partition('/')[2]]}"
        look = Look(y="score", show_y=scale.percent, dots=True)
        cards.append(card(f"{title} by step", over(score, look)))
        cards.append(card(f"{title} over what it cost", _over_cost(given, named, score)))
    cards.append(card("Training loss by time", over("train/loss", Look(x=clock.label, y="loss", log=True))))
    speed = Look(x=clock.label, y="images a second", zero=True)
    cards.append(card("Images a second", over("perf/images_per_second", speed)))
    more = "" if len(given) <= chart.CURVES else paragraph(f"Charts show the first {chart.CURVES} runs.", "soft")
    return section("Curves", more, grid(*cards))


def _over_cost(given: Sequence[Facts], named: Sequence[str], score: str) -> str:
    """A score by the TPUv3-core-days, by FLOPs, that had gone into it."""
    lines = []
    for name, facts in zip(named, given, strict=True):
        spent = dict(facts.over_steps("cost/tpu_v3_core_days_flops"))
        points = [(spent[step], value) for step, value in facts.over_steps(score) if step in spent]
        lines.append(Curve(name, points))
    return chart.curves(lines, Look(x="TPUv3-core-days by FLOPs", y="score", show_y=scale.percent, dots=True))


def _score(key: str) -> Figure:
    """A score of the last evaluation."""
    return lambda facts: f"{facts.scores[key]:.2%}" if key in facts.scores else ""


def _billed(show: Callable[[Ledger], float | None], form: str) -> Figure:
    """A figure of the ledger."""

    def shown(facts: Facts) -> str:
        """As text."""
        value = show(facts.bill.ledger) if facts.bill is not None else None
        return "" if value is None else format(value, form)

    return shown


def _rate(facts: Facts) -> str:
    """Images a second."""
    rate = facts.typical("perf/images_per_second")
    return "" if rate is None else f"{rate:,.4g}"


FIGURES: dict[str, Figure] = {
    "status": Facts.status,
    "top-1": _score("eval/top1"),
    "top-1, averaged": _score("eval_ema/top1"),
    "mAP": _score("eval/map"),
    "mAP, averaged": _score("eval_ema/map"),
    "loss": lambda facts: "" if facts.last("train/loss") is None else f"{facts.last('train/loss'):.4g}",
    "images/s": _rate,
    "goodput": lambda facts: "" if facts.bill is None else f"{facts.bill.goodput:.1%}",
    "images": _billed(lambda ledger: float(ledger.images), ",.0f"),
    "device-hours": _billed(lambda ledger: ledger.device_seconds / HOUR, ",.4g"),
    "MFU": _billed(lambda ledger: ledger.mfu, ".1%"),
    "core-days by FLOPs": _billed(lambda ledger: ledger.core_days_flops, ".4g"),
    "core-days by time": _billed(lambda ledger: ledger.core_days_device, ".4g"),
    "kWh": _billed(lambda ledger: ledger.energy_kwh, ".4g"),
    "money": _billed(lambda ledger: ledger.money, ",.4g"),
}
