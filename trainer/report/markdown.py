"""The same facts as Markdown: a part of a README, and a model card."""

from collections.abc import Iterable, Sequence
from typing import Any

from models import spec
from trainer.cost import bill, statement
from trainer.cost.ledger import HOUR
from trainer.report import compare
from trainer.report.gather import Facts
from trainer.report.pictures import name_of
from trainer.tracking import data_card

SCORES = {"top1": "top-1", "top5": "top-5", "map": "mean average precision"}
LIMITS = (
    "Scores are of the held-out split of the data above, and of nothing else. The classes are those of that data set; "
    "a picture of anything else gets one of them all the same."
)
WORST = 5  # classes of a model card


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def of_runs(given: Sequence[Facts]) -> str:
    """Results and cost of one run or several, for a README."""
    if len(given) > 1:
        head, rows = compare.result_rows(given, compare.names(given))
        return table(head, rows) + "\n"
    (facts,) = given
    lines = [f"**{facts.name}**: {about(facts)}; {facts.status()}.", "", table(("score", "value"), scores(facts))]
    if facts.bill is not None:
        beside = bill.against(facts.bill)
        bills = statement.lines(facts.bill, beside)
        title = f"paper: {beside.title}" if beside is not None else ""
        wide = 4 if beside is not None else 2
        lines += ["", table(("cost", "this run", title, "ratio")[:wide], [row[:wide] for row in bills])]
    changes = facts.changes()
    if changes:
        lines += ["", table(("setting", "recipe", "this run"), changes)]
    return "\n".join(lines) + "\n"


def model_card(facts: Facts) -> str:
    """A model card: what the network is, what it was trained on and how, how well it does, what it cost."""
    run, parts = facts.run, [f"# {facts.name}", "", about(facts) + ".", ""]
    network = spec.of(run.model)
    parts += ["## Network", "", f"{network.name} (CoAtNet, arXiv 2106.04803) at {run.model.resolution} x "
              f"{run.model.resolution} pixels, stride in the {network.stride} convolution. Weights: "
              f"{'averaged' if run.optim.ema else 'raw'}; `coatnet export` writes them.", ""]  # fmt: skip
    if facts.data is not None:
        parts += ["## Training data", "", table(("fact", "value"), data_card.rows(facts.data)), ""]
        bad = len({(one["shard"], one["sample"]) for one in facts.bad_samples})
        parts += [f"{bad:,} damaged samples were replaced by others." if bad else "No damaged sample was met.", ""]
    augment = run.augment
    rows = [
        ("loss", f"{run.optim.loss}, label smoothing {run.optim.label_smoothing:g}"),
        ("optimizer", f"AdamW, peak learning rate {run.optim.lr:g} ({run.optim.schedule} to {run.optim.min_lr:g}), "
         f"weight decay {run.optim.weight_decay:g}, clip {run.optim.clip_norm:g}"),
        ("length", f"{facts.step:,} updates of {run.data.global_batch:,} images"),
        ("augmentation", f"RandAugment {augment.randaugment_layers}, {augment.randaugment_magnitude:g}; mixup "
         f"{augment.mixup_alpha:g}; cutmix {augment.cutmix_alpha:g}; stochastic depth {run.model.drop_path:g}"),
        ("arithmetic", run.precision.dtype),
        ("recipe", run.recipe or "none"),
        ("began from", run.init.path or "fresh weights"),
    ]  # fmt: skip
    parts += ["## Training", "", table(("", ""), rows), "", "## Evaluation", ""]
    parts += [table(("score", "value"), scores(facts)) if scores(facts) else "Not scored yet.", ""]
    parts += worst(facts)
    if facts.bill is not None:
        rows = [(line.label, line.run) for line in statement.lines(facts.bill, None)]
        parts += ["## Cost", "", table(("", ""), rows), ""]
    parts += ["## Limits", "", LIMITS, ""]
    return "\n".join(parts)


def data_card_page(data: dict[str, Any]) -> str:
    """A page on the data."""
    return f"# Data\n\n{table(('fact', 'value'), data_card.rows(data))}\n"


def about(facts: Facts) -> str:
    """One line on a run."""
    where = ", ".join(dict.fromkeys(f"{one['world']} x {one['device']}" for one in facts.of_kind("start", "resume")))
    hours = f", {facts.bill.ledger.device_seconds / HOUR:.3g} device-hours" if facts.bill is not None else ""
    run = facts.run
    return (
        f"{run.model.name} at {run.model.resolution} px, recipe {run.recipe or 'none'}, {where or 'no device'}{hours}"
    )


def scores(facts: Facts) -> list[tuple[str, str]]:
    """The last evaluation's."""
    found = []
    for prefix, weights in (("eval_ema", "averaged weights"), ("eval", "raw weights")):
        for key, name in SCORES.items():
            if f"{prefix}/{key}" in facts.scores:
                samples = facts.scores.get(f"{prefix}/samples", 0)
                value = f"{facts.scores[f'{prefix}/{key}']:.2%} of {samples:,.0f} images"
                found.append((f"held-out {name}, {weights}", value))
    return found


def worst(facts: Facts) -> list[str]:
    """The classes with the lowest scores, in a sentence."""
    if facts.examples is None:
        return []
    names = facts.data["vocabulary"] if facts.data is not None else []
    rows = facts.examples["worst"][:WORST]
    told = ", ".join(f"{name_of(number, names)} ({share:.1%} of {count:,})" for number, count, share in rows)
    return [f"Lowest {facts.examples['score']} of {facts.examples['classes']:,} classes: {told}.", ""]
