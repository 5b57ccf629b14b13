"""`coatnet bench blocks`: the seconds of every block on this machine, for the cuts of a pipeline."""

import json
import statistics
import sys
from pathlib import Path

from configs.errors import InputError, at_least

PURPOSE = """Times the forward and backward pass of each block of RECIPE's network on this machine, one after the other,
under the recipe's precision, recomputation and compilation. Further words are fields, as for `coatnet train`."""
UNSAID = 16  # samples of a pass where neither the command nor the recipe says


def bench_blocks_command(arguments: list[str]) -> int:
    """`coatnet bench blocks RECIPE ...`: returns the exit code."""
    from trainer.commands.config import Arguments, resolve_command

    parser = Arguments("bench blocks RECIPE", PURPOSE)
    parser.add_argument("--batch", type=int, help=f"samples of a pass; else the recipe's micro-batch, else {UNSAID}")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each block; its figure is their median")
    parser.add_argument("--out", type=Path, help="FILE.json for {block: seconds}, which --parallel.balance takes")
    parser.add_argument("--json", action="store_true", help="print {block: seconds}")
    parsed = parser.parse_behind_recipe(arguments)
    if parsed is None:
        return 0
    options, fields = parsed
    run = resolve_command(arguments[0], fields)
    batch = options.batch if options.batch is not None else run.parallel.micro_batch or UNSAID
    at_least("--batch", batch, 2)  # one sample has no variance
    at_least("--rounds", options.rounds, 1)
    if options.out is not None and (options.out.suffix != ".json" or not options.out.parent.is_dir()):
        raise InputError(f"--out {options.out}: must be FILE.json in a folder that exists")
    from trainer.bench.blocks import measure
    from trainer.machine.extras import check_fairscale

    check_fairscale(run)
    seconds = {name: statistics.median(values) for name, values in measure(run, batch, options.rounds).items()}
    print(json.dumps(seconds) if options.json else describe(seconds))
    if options.out is not None:
        options.out.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.out}", file=sys.stderr)
    return 0


def describe(seconds: dict[str, float]) -> str:
    """Block, milliseconds and share of the whole in aligned columns."""
    width, total = max(map(len, seconds)), sum(seconds.values())
    return "\n".join(f"{name:{width}}  {value * 1e3:9.3f} ms  {value / total:6.1%}" for name, value in seconds.items())
