"""The sections of one run's report, each from its facts to HTML."""

import json
import time
from dataclasses import replace
from html import escape

from configs import resolve
from trainer.cost import bill, statement
from trainer.health.goodput import CLASSES
from trainer.report import chart, scale
from trainer.report.chart import Curve, Look, Mark
from trainer.report.gather import HOUR, Facts, clock_of
from trainer.report.parts import Html, card, fold, grid, pairs, paragraph, section, table, tile
from trainer.tracking import data_card

SHOWN = 12  # bad samples, changed settings of a kind, worst classes in a first look
HAPPENINGS = {  # events that the charts over time show: a letter, and what it means
    "resume": ("R", "goes on after a stop or a fault"),
    "save": ("s", "save"),
    "save_failed": ("!", "save failed"),
    "rollback": ("B", "rolled back"),
    "guard": ("g", "the guard spoke"),
    "damage": ("d", "damaged samples"),
    "stop": ("E", "stopped on request"),
    "diverged": ("X", "diverged"),
    "ended": ("C", "the ranks ended before they should"),
    "hung": ("H", "the ranks hung"),
    "preflight": ("N", "nodes were not fit"),
}
FAULTS = ("resume", "save_failed", "rollback", "diverged", "ended", "hung", "preflight")
STATES = {
    "states": "states: weights, gradients, moments",
    "activations": "activations",
    "gathered": "whole weights of ZeRO-3",
    "buffers": "DeepSpeed's buffers",
    "workspace": "kernels' scratch and the allocator",
    "apart": "of these never together",
    "libraries": "libraries",
    "moved": "of the states elsewhere",
}
SCORES = {"top1": "top-1", "top5": "top-5", "map": "mAP"}


def tiles(facts: Facts) -> Html:
    """What is read from afar."""
    found = []
    for prefix, weights in (("eval_ema", "averaged weights"), ("eval", "raw weights")):
        for key in ("map", "top1"):
            if f"{prefix}/{key}" in facts.scores:
                samples = f"{facts.scores.get(f'{prefix}/samples', 0):,.0f} held-out images, {weights}"
                found.append(tile(f"held-out {SCORES[key]}", f"{facts.scores[f'{prefix}/{key}']:.2%}", samples))
    loss = facts.over_steps("train/loss")
    if loss:
        found.append(tile("training loss", f"{loss[-1][1]:.4g}", f"step {loss[-1][0]:,.0f}",
                          chart.sparkline([value for _, value in loss])))  # fmt: skip
    rate = facts.typical("perf/images_per_second")
    if rate is not None:
        mfu = facts.typical("perf/mfu")
        found.append(tile("images a second", f"{rate:,.4g}", "median" + (f"; MFU {mfu:.1%}" if mfu else "")))
    if facts.bill is not None:
        ledger = facts.bill.ledger
        found.append(tile("goodput", f"{facts.bill.goodput:.1%}", f"of {scale.hours(facts.bill.wall / HOUR)} in "
                          f"{facts.bill.attempts} attempt(s)"))  # fmt: skip
        found.append(tile("device-hours", f"{ledger.device_seconds / HOUR:,.4g}",
                          ", ".join(dict.fromkeys(one.device for one in ledger.holdings))))  # fmt: skip
        found.append(tile("TPUv3-core-days", f"{ledger.core_days_flops:.4g}", "by model FLOPs, at 30 % of peak"))
        if ledger.money is not None:
            found.append(tile("money", statement.amount(ledger.money), unit=bill.currency(ledger)))
        if ledger.energy_kwh is not None:
            measured = ledger.energy_measured
            how = f"{measured:.0%} of the time measured" if measured else "an estimate"
            value, unit = statement.kilowatt_hours(ledger.energy_kwh).split(" ")
            found.append(tile("energy", value, how, unit=unit))
    return Html(f'<div class="tiles">{"".join(found)}</div>')


def what(facts: Facts) -> Html:
    """What was run."""
    run, started = facts.run, facts.of_kind("start", "resume")
    worlds = ", ".join(dict.fromkeys(f"{event['world']} x {event['device']}" for event in started)) or "nothing yet"
    rows = [
        ("recipe", run.recipe or "none"),
        ("network", f"{run.model.name} at {run.model.resolution} px"),
        ("ran on", worlds),
        ("layout", f"global batch {run.data.global_batch:,}, ZeRO-{run.parallel.zero}, recompute "
         f"{run.parallel.recompute}, pipeline {run.parallel.pipeline}, {run.precision.dtype}"),
        ("optimizer", f"AdamW, peak learning rate {run.optim.lr:g}, {run.optim.schedule}, weight decay "
         f"{run.optim.weight_decay:g}, loss {run.optim.loss}"),
        ("began from", run.init.path or "fresh weights"),
        ("configuration", resolve.digest(run)),
        ("code", str(facts.environment.get("commit", "unknown"))),
    ]  # fmt: skip
    changes = facts.changes()
    if changes is None:
        told = paragraph(
            f"The recipe {run.recipe} is not one of coatnet's own; there is nothing to compare with.", "soft"
        )
    elif changes:
        told = table(("setting", "recipe", "this run"), [(key, _plain(was), _plain(now)) for key, was, now in changes],
                     code=(0, 1, 2))  # fmt: skip
    else:
        told = paragraph("Exactly the recipe's settings.", "soft")
    whole = fold("every setting", Html(f"<pre>{escape(resolve.to_json(run))}</pre>"))
    return section("What was run", grid(card("", pairs(rows), whole), card("Differs from its recipe in", told)))


def learning(facts: Facts) -> Html:
    """Loss, scores, learning rate and gradient norm over the steps."""
    return section("Learning", grid(*(card(title, svg) for title, svg in learning_charts(facts).items())))


def learning_charts(facts: Facts) -> dict[str, str]:
    """The charts over steps by their titles."""
    averaged = {"eval": "", "eval_ema": ", averaged"}
    scores = [
        Curve(f"{name}{averaged[prefix]}", facts.over_steps(f"{prefix}/{key}"))
        for key, name in SCORES.items()
        for prefix in averaged
    ]
    scores = [curve for curve in scores if curve.points]

    def alone(key: str, look: Look) -> str:
        """A chart of one figure."""
        return chart.curves([Curve("", facts.over_steps(key))], look)

    found = {"Training loss": alone("train/loss", Look(y="loss", log=True))}
    if scores:
        found["Held-out scores"] = chart.curves(scores, Look(y="score", show_y=scale.percent, dots=True))
    found["Learning rate"] = alone("train/lr", Look(y="learning rate", zero=True))
    found["Gradient norm, before clipping"] = alone("train/grad_norm", Look(y="gradient norm", log=True))
    return found


def speed(facts: Facts) -> Html:
    """Throughput over time, with what interrupted it."""
    told = letters(happenings(facts))
    cards = [card(title, svg, told) for title, svg in speed_charts(facts).items()]
    return section("Speed over time", grid(*cards))


def speed_charts(facts: Facts) -> dict[str, str]:
    """The charts over time by their titles."""
    clock = clock_of([facts])
    marks = [replace(mark, x=mark.x * clock.per_hour) for mark in happenings(facts)]

    def over(key: str, y: str, show: scale.Format = scale.short) -> str:
        """One chart."""
        look = Look(x=clock.label, y=y, show_y=show, zero=True, marks=marks)
        return chart.curves([Curve("", clock.points(facts, key))], look)

    found = {"Images a second": over("perf/images_per_second", "images a second")}
    if facts.last("perf/mfu") is not None:
        found["Model FLOPs utilisation"] = over("perf/mfu", "MFU", scale.percent)
    found["Share of the time that waits for data"] = over("data/wait_fraction", "waits for data", scale.percent)
    return found


def happenings(facts: Facts) -> list[Mark]:
    """Starts after the first, faults and saves, as marks on a chart over hours."""
    found = []
    for event in facts.of_kind(*HAPPENINGS):
        kind = str(event["event"])
        letter, what = HAPPENINGS[kind]
        more = {
            "guard": f": {event.get('of')}, {event.get('action')}", "save_failed": f": {event.get('reason')}",
            "ended": f": exit code {event.get('code')}", "hung": f": {event.get('named') or event.get('why')}",
            "preflight": f": {', '.join(event.get('bad', ()))}",
        }  # fmt: skip
        at = f" at step {event['step']}" if "step" in event else ""
        text = f"{what}{at}{more.get(kind, '')}"
        found.append(Mark(facts.hours(float(event["time"])), letter, text, kind in FAULTS))
    starts = facts.of_kind("start")[1:]
    return found + [Mark(facts.hours(float(event["time"])), "R", "starts again from nothing", True) for event in starts]


def letters(marks: list[Mark]) -> Html:
    """What the letters above a chart mean."""
    there = {mark.letter for mark in marks}
    told = [f"{letter} {what}" for letter, what in HAPPENINGS.values() if letter in there]
    return paragraph("; ".join(told), "soft") if told else Html("")


def time_spent(facts: Facts) -> Html:
    """Where the wall time went."""
    if facts.bill is None:
        return Html("")
    parts = [(name, facts.bill.seconds[name]) for name in CLASSES]
    told = paragraph(f"{facts.bill.goodput:.1%} of {scale.hours(facts.bill.wall / HOUR)} since the first start were "
                     f"productive, in {facts.bill.attempts} attempt(s). Every second is in one part.")  # fmt: skip
    shown = chart.bar(parts, lambda seconds: scale.hours(seconds / HOUR))
    return section("Where the time went", card("", told, Html(shown)))


def cost(facts: Facts) -> Html:
    """The bill beside the paper's row."""
    if facts.bill is None:
        return Html("")
    beside = bill.against(facts.bill)
    rows = statement.lines(facts.bill, beside)
    if beside is None:
        shown = table(("", "this run"), [row[:2] for row in rows])
        told = paragraph(
            "The paper's table 5 has no row of this network. coatnet cost --against ROW names one.", "soft"
        )
    else:
        shown = table(("", "this run", f"paper: {beside.title}", "ratio"), rows, numbers=(2, 3))
        told = paragraph(
            "The paper's row is a whole pre-training; the ratio says which part of it this run is.", "soft"
        )
    document = json.dumps(bill.document(facts.bill, beside), indent=1)
    return section("What it cost", card("", shown, told, fold("as JSON, from which every figure follows",
                                                              Html(f"<pre>{escape(document)}</pre>"))))  # fmt: skip


def predicted(facts: Facts) -> Html:
    """What was foretold of the first rank at the last start, beside what was measured since then."""
    told = facts.of_kind("predicted")
    if not told:
        return Html("")
    facts = replace(facts, lines=[line for line in facts.lines if line.time >= float(told[-1]["time"])])
    rows = [(name, *_pair(facts, told[-1], key)) for name, key in (("memory of a rank at its peak", "memory"),
                                                                  ("seconds a step", "step"))]  # fmt: skip
    parts = [(name, f"{told[-1][key] / 1e9:.3g} GB") for key, name in STATES.items() if told[-1].get(key)]
    return section(
        "Predicted and measured",
        card(
            "",
            paragraph("Of the first rank, since the last start.", "soft"),
            table(("", "predicted", "measured", "measured over predicted"), [row for row in rows if row[1]], (1, 2, 3)),
            fold("what the prediction is made of", pairs(parts)),
        ),
    )


def _pair(facts: Facts, told: dict[str, float], what: str) -> tuple[str, str, str]:
    """Predicted, measured and their ratio; empty where nothing was predicted."""
    if what == "memory":
        on_cpu = all(event["device"] == "cpu" for event in facts.of_kind("start", "resume")[-1:])
        # On a GPU torch's allocator is asked, which knows nothing of libraries.
        expected: float | None = told.get("bytes", 0) - (0 if on_cpu else told.get("libraries", 0))
        measured = max((line.values.get("memory/peak_bytes", 0) for line in facts.lines), default=0)
        unit, form = 1e9, "{:.3g} GB"
    else:
        rate = facts.typical("perf/images_per_second")
        expected, measured = told.get("step_seconds"), facts.run.data.global_batch / rate if rate else 0
        unit, form = 1.0, "{:.4g} s"
    if not expected:
        return "", "", ""
    ratio = f"{measured / expected:.2f}" if measured else ""
    return form.format(expected / unit), form.format(measured / unit) if measured else "nothing yet", ratio


def data(facts: Facts) -> Html:
    """The data card, and what was found damaged."""
    if facts.data is None:
        return Html("")
    bad = {(one["shard"], one["sample"]): one for one in facts.bad_samples}
    rows = [(one["shard"].rpartition("/")[2], one["sample"], one["key"], one["reason"][:200])
            for one in list(bad.values())[:SHOWN]]  # fmt: skip
    count = len(bad)
    told = paragraph(f"{count:,} damaged samples were replaced." if count else "No damaged sample was met.")
    listed = table(("shard", "sample", "key", "why"), rows, code=(2,)) if rows else Html("")
    return section(
        "Data", grid(card("Data card", pairs(data_card.rows(facts.data))), card("Bad samples", told, listed))
    )


def environment(facts: Facts) -> Html:
    """Machine and software of the last start, what its machines did, and what happened."""
    known = facts.environment
    rows = [(name, known[name]) for name in ("device", "cpu", "cores", "kernel", "commit") if name in known]
    versions = known.get("versions", {})
    cards = [card("Machine and software", pairs([*rows, *versions.items()]))]
    spread = []
    for host, lines in list(facts.machines.items())[:16]:
        for key in sorted({key for line in lines for key in line.values}):
            values = [line.values[key] for line in lines if key in line.values]
            spread.append((host, key.replace("_", " "), f"{sum(values) / len(values):,.4g}", f"{max(values):,.4g}"))
    if spread:
        cards.append(card("Machines", table(("host", "figure", "mean", "most"), spread, (2, 3))))
    events = [
        (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(event["time"]))), event["event"],
         json.dumps({key: value for key, value in event.items() if key not in ("time", "event")}))
        for event in facts.events
    ]  # fmt: skip
    happened = fold(f"all {len(events)} events (UTC)", table(("when", "what", "facts"), events, code=(2,)))
    return section("Environment", grid(*cards), happened)


def _plain(value: object) -> str:
    """A setting as one would type it."""
    return " ".join(map(_plain, value)) if isinstance(value, tuple) else repr(value) if value == "" else str(value)
