"""`coatnet report`: a run's whole story on one page, or several runs beside each other. Never imports torch."""

import sys
from pathlib import Path

from configs.errors import InputError
from trainer.commands.config import Arguments

REPORT_USAGE = """usage: coatnet report RUN [RUN ...] [--out FILE] [--markdown | --card]

Writes one HTML file that needs no network and no other file, from what the run folder holds: what was run and how it
differs from its recipe; loss, learning rate, scores; speed over time with faults and saves; where the time went; the
cost beside the paper's; memory and step time as predicted and as measured; the data card and bad samples; pictures with
predictions, the worst classes; the environment. It works while a run goes on, and after it broke off. Of several runs:
results, settings that differ, and curves beside each other, with the report of each below.

--out FILE   where to; default RUN/report.html, of several runs report.html here
--markdown   results and cost as Markdown for a README, on the screen or to --out
--card       a model card as Markdown, likewise; training writes it to RUN/model-card.md when it is finished"""


def report_command(arguments: list[str]) -> int:
    """`coatnet report RUN ...`: returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(REPORT_USAGE)
        return 0
    parser = Arguments("report", "A run's whole story on one page.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--card", action="store_true")
    options = parser.parse_strict(arguments)
    if options.card and (options.markdown or len(options.runs) > 1):
        raise InputError("coatnet report --card: a model card is of one run; leave --markdown and other runs out")
    from trainer.report import gather, markdown, write

    given = [gather.facts(folder) for folder in options.runs]
    if options.markdown or options.card:
        text = markdown.model_card(given[0]) if options.card else markdown.of_runs(given)
        if options.out is None:
            sys.stdout.write(text)
            return 0
    else:
        text = write.html(given)
    single = options.runs[0] / write.FILE if len(given) == 1 else Path(write.FILE)
    print(f"wrote {write.write(options.out or single, text)}")
    return 0
