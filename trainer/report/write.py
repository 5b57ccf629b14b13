"""The report as files: the page, its charts one by one, the model's card and the data's."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from configs.errors import InputError
from trainer.report import chart, markdown, page, sections, style
from trainer.report.gather import Facts, facts

FILE, CARD, DATA, PLOTS = "report.html", "model-card.md", "data-card.md", "plots"  # in the run's folder


def report(folder: Path) -> Path:
    """Write a run's report, its charts and its cards into its own folder; returns the report's path.

    Raises:
        InputError: the folder cannot be read, or not written to.
    """
    found = facts(folder)
    write(folder / CARD, markdown.model_card(found))
    if found.data is not None:
        write(folder / DATA, markdown.data_card_page(found.data))
    for name, svg in plots(found).items():
        write(folder / PLOTS / f"{name}.svg", svg)
    return write(folder / FILE, html([found]))


def plots(found: Facts) -> dict[str, str]:
    """The charts as pictures that stand alone, light on white, by the names of their files."""
    charts = sections.learning_charts(found) | sections.speed_charts(found)
    made = {}
    for title, svg in charts.items():
        if svg.startswith("<svg"):
            name = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
            made[name] = alone([svg])
    return made


def alone(charts: Sequence[str]) -> str:
    """Charts below each other as one picture that stands alone, light on white."""
    width, height = chart.WIDTH, chart.HEIGHT
    parts = []
    for number, svg in enumerate(charts):
        top, inside = re.sub(r" data-chart='[^']*'", "", svg).split(">", 1)
        place = f'y="{number * height}" width="{width}" height="{height}"'
        parts.append(f"{top.replace('<svg', f'<svg {place}')}>{inside}")
    whole = f'viewBox="0 0 {width} {len(charts) * height}" width="{2 * width}" height="{2 * len(charts) * height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {whole}><style>{style.ALONE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def html(given: Sequence[Facts]) -> str:
    """The page of one run or of several."""
    return page.of_one(given[0]) if len(given) == 1 else page.of_several(given)


def write(path: Path, text: str) -> Path:
    """Write a text file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    aside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}; choose another --out") from None
    return path
