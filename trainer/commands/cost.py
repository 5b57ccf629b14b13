"""`coatnet cost`: what a run cost so far, beside the paper's own. Never imports torch."""

import json
from pathlib import Path

from trainer.commands.config import Arguments
from trainer.cost import bill, paper, statement

COST_USAGE = f"""usage: coatnet cost RUN [RUN ...] [--against ROW] [--json]

What a run cost so far, whether it goes on, broke off or is finished: images, model FLOPs (6 x multiply-adds x images,
nothing for recomputation), device-hours, MFU over all the time the devices were held, TPUv3-core-days, energy, money.
Work that a crash or a rollback undid counts as device time, energy and money, with a line of its own; its images do
not count.

TPUv3-core-days by FLOPs   what the same work costs on the paper's machine at 30 % of its peak: model FLOPs over
                           86400 x 61.5e12 x 0.30; where the paper's own run is known, at that run's share too
TPUv3-core-days by time    the device time in TPUv3 cores of equal peak: device-days x peak of the device / 61.5e12

Money needs --cluster.price (and --cluster.currency) of the run. Energy is measured where NVML (package nvidia-ml-py)
or RAPL (/sys/class/powercap) can be read; else it is an estimate, and says so: a device's nominal power, or
--cluster.watts.

RUN            a run folder, or a file that `coatnet cost RUN --json` printed
--against ROW  a row of the paper's table 5; else that of the run's own model. Rows:
               {", ".join(list(paper.ROWS)[:4])},
               {", ".join(list(paper.ROWS)[4:])}
--json         one list with the facts and figures of every run, for programs; each figure follows from the facts"""


def cost_command(arguments: list[str]) -> int:
    """`coatnet cost RUN ...`: returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(COST_USAGE)
        return 0
    parser = Arguments("cost", "What a run cost so far.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--against", default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_strict(arguments)
    bills = bill.of_paths(options.runs)
    beside = [bill.against(one, options.against) for one in bills]
    if options.json:
        print(json.dumps([bill.document(*pair) for pair in zip(bills, beside, strict=True)], indent=1))
    else:
        print("\n\n".join(statement.text(*pair) for pair in zip(bills, beside, strict=True)))
    return 0
