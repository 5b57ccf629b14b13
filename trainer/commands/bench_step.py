"""`coatnet bench step`: the seconds of whole training steps on this machine, for the planner. Never imports torch."""

import json
import sys
import tempfile
from pathlib import Path

from configs.errors import InputError, at_least

PURPOSE = """Trains RECIPE on made-up pictures on all devices of this machine, nine short runs under ZeRO 0 to 3 (on a
CPU ten), and fits the planner's rates to what they took: ~/.config/coatnet/rates has them from then on. Prints every
block's time beside the roofline; leaves a trace for chrome://tracing and what is known of the memory in the folder of
the runs. Further words are fields, as for `coatnet train`."""


def bench_step_command(arguments: list[str]) -> int:
    """`coatnet bench step RECIPE ...`: returns the exit code."""
    from trainer.commands.config import Arguments, resolve_command

    parser = Arguments("bench step RECIPE", PURPOSE)
    parser.add_argument("--also", nargs="+", default=[], metavar="MODEL", help="more networks to learn the rates from")
    parser.add_argument(
        "--ranks", type=int, default=0, help="devices, or processes on a CPU; else as many as there are"
    )
    parser.add_argument("--rates", type=Path, help="folder for the rates, in place of the user's own")
    parser.add_argument("--runs-in", type=Path, help="folder for the runs with their profiles; else a temporary one")
    parser.add_argument("--out", type=Path, help="folder for a record")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    parsed = parser.parse_behind_recipe(arguments)
    if parsed is None:
        return 0
    options, fields = parsed
    at_least("--ranks", options.ranks, 0)
    recipes = [resolve_command(arguments[0], [*fields, *words]) for words in _networks(options.also)]
    if options.runs_in is not None and options.runs_in.exists() and any(options.runs_in.iterdir()):
        raise InputError(f"--runs-in {options.runs_in}: must be empty or not there yet")
    from trainer.bench import step as bench_step
    from trainer.planning import rates

    command = " ".join(["coatnet bench step", *arguments])
    place = options.rates if options.rates is not None else rates.folder()
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs_in if options.runs_in is not None else Path(scratch)
        found = bench_step.learn(recipes, options.ranks, runs, command, lambda line: print(line, file=sys.stderr))
    print(json.dumps(vars(found.record)) if options.json else f"{found.table}\n\n{found.summary}")
    print(f"wrote {found.rates.write(place)}", file=sys.stderr)
    if options.out is not None:
        print(f"wrote {found.record.write(options.out)}", file=sys.stderr)
    return 0


def _networks(also: list[str]) -> list[list[str]]:
    """The words that change a recipe's network, for each network: none for its own."""
    return [[], *(["--model.name", name] for name in also)]
