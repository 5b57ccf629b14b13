"""Measurements that can be trusted: alternated rounds, one record format, tables made from records. No torch."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One measurement as it is kept in `tests/records/`.

    Attributes:
        name: what was measured.
        command: how to measure it again.
        facts: hardware, versions and commit (`environment.facts`).
        config: the settings that were measured, flat.
        unit: of the samples.
        samples: for each case its raw values, one per round, in the order of the rounds.
        summary: the figures a reader wants, in words and numbers; derived from the samples.
    """

    name: str
    command: str
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    unit: str
    samples: Mapping[str, list[float]]
    summary: Mapping[str, Any] = field(default_factory=dict)
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    format: int = FORMAT

    def write(self, folder: Path) -> Path:
        """Write `<folder>/<name>.json`; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def read(path: Path) -> Record:
    """A record from its file.

    Raises:
        InputError: not a record of this format.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise InputError(f"{path}: record format {content['format']}, this program reads {FORMAT}")
        return Record(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a benchmark record ({error})") from None


def alternate(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every case once a round, the order turned round by round, so that drift hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            samples[name].append(cases[name]())
    return samples


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of `over / under`, each pair from one round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def table(folder: Path) -> str:
    """A Markdown table of the records in `folder`: what, on which hardware, the figures, the commit."""
    rows = ["| measured | result | hardware | date, commit | again by |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        record = read(path)
        result = "; ".join(f"{key} {value}" for key, value in record.summary.items())
        hardware = f"{record.facts['device']}, {record.facts['cores']} cores of {record.facts['cpu']}"
        rows.append(
            f"| {record.name} | {result} | {hardware} | {record.when}, {record.facts['commit']} | `{record.command}` |"
        )
    return "\n".join(rows)


def insert(page: Path, text: str) -> None:
    """Put `text` between the marks `<!-- records -->` and `<!-- /records -->` of a page.

    Raises:
        InputError: the page has no such marks.
    """
    content = page.read_text()
    before, mark, rest = content.partition("<!-- records -->\n")
    _, end, after = rest.partition("<!-- /records -->")
    if not mark or not end:
        raise InputError(f"{page}: no <!-- records --> ... <!-- /records --> to write between")
    page.write_text(f"{before}{mark}{text}\n{end}{after}")


def main(arguments: list[str]) -> int:
    """`python -m trainer.bench.record RECORDS [PAGE]`: print the table of some records, or write it into a page."""
    text = table(Path(arguments[0]))
    if len(arguments) > 1:
        insert(Path(arguments[1]), text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
