"""The page: one file of HTML with its own style, charts and script, that asks no network for anything."""

import time
from collections.abc import Sequence
from html import escape

from trainer.report import chart, compare, pictures, sections, style
from trainer.report.gather import Facts
from trainer.report.parts import fold

SAFE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ORDER = (sections.what, sections.learning, sections.speed, sections.time_spent, sections.cost, sections.predicted,
         pictures.examples, sections.data, sections.environment)  # fmt: skip


def of_one(facts: Facts) -> str:
    """The report of one run."""
    run = facts.run
    about = f"{run.model.name} at {run.model.resolution} px, recipe {run.recipe or 'none'}"
    return _page(facts.name, f"{about}: {facts.status()}", sections.tiles(facts), *(part(facts) for part in ORDER))


def of_several(given: Sequence[Facts]) -> str:
    """The comparison of several runs, and below it the report of each."""
    names = compare.names(given)
    each = [
        fold(f"the whole report of {name}", sections.tiles(facts), *(part(facts) for part in ORDER))
        for name, facts in zip(names, given, strict=True)
    ]
    return _page(f"{len(given)} runs compared", ", ".join(names), compare.page(given, names), *each)


def _page(title: str, below: str, *content: str) -> str:
    """The whole document."""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(SAFE)}">'
        f"<title>{escape(title)} - coatnet report</title><style>{style.CSS}</style>"
    )
    top = (
        f'<header><div><h1>{escape(title)}</h1><p class="soft">{escape(below)}</p></div>'
        '<button id="theme" type="button">light or dark</button></header>'
    )
    end = (
        f"<footer>Made {made} by coatnet report from the run's own folder. Curves of more than {chart.POINTS} points "
        "are drawn as the mean of neighbours, in a band from least to most.</footer>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{top}{chart.patterns()}{"".join(content)}'
        f'{end}</main><div id="tip" role="status"></div><script>{style.SCRIPT}</script></body></html>\n'
    )
