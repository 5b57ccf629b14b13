"""`coatnet drill`: practises faults on a tiny run and says how long it took to notice and to go on."""

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.errors import InputError, unknown

DRILL_USAGE = """usage: coatnet drill FAULT [FAULT ...] | all [--ranks N] [--out FOLDER] [--json]

Trains a tiny network on the demo's digits on this machine, makes the fault happen, starts the command again where it
ended the command itself (of ranks alone, coatnet train does it), and holds the losses of all steps against those of a
run that nothing disturbed, or that left the bad batches out from the start. On CPUs they must be the same to the last
bit. A fault takes about half a minute. A drill is of one machine: on a cluster, srun --nodes 1 coatnet drill all.

--ranks N     processes of the run; as many as `coatnet train` takes here if not given
--out FOLDER  keep the runs there; else they lie in a temporary folder, which stays only if a fault was not survived
--json        the same figures for programs

noticed   seconds from the fault (of one inside a step: from that step's beginning) until the ranks had ended or the
          run told of it; of a damaged checkpoint: from the next start
back      from then until the next finished step; where the ranks had ended, with the new start of all processes
repeated  steps that were made again
ETTR      effective training time ratio, see trainer/health/ettr.py: of these tiny runs, and foretold from what the
          faults that ended the ranks cost here for a failure every 7.9 h and every 1 h

exit codes: 0 all survived; 1 some fault was not; 76 wrong words

the faults:
"""


def drill_command(arguments: list[str]) -> int:
    """`coatnet drill FAULT ...`: returns the exit code.

    Raises:
        InputError: an unknown fault or option, or the run fails without a fault.
    """
    from trainer.health.faults import CATALOGUE
    from trainer.health.scene import DrillError

    if not arguments or {"-h", "--help"} & set(arguments):
        rows = [f"  {name:16s} {fault.purpose}" for name, fault in CATALOGUE.items()]
        sys.stdout.write(DRILL_USAGE + "\n".join(rows) + "\n")
        return 0
    names, ranks, out, as_json = _parse(arguments, list(CATALOGUE))
    from trainer.health.drill import drill

    folder = Path(out or tempfile.mkdtemp(prefix="coatnet-drill-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"--out {folder}: is not empty; choose a new folder")
        found = drill(names, folder, ranks, lambda text: print(text, file=sys.stderr, flush=True))
    except DrillError as error:
        raise InputError(f"the drill cannot begin: {error}") from None
    survived = not any(row["problem"] for row in found["results"])
    print(json.dumps(found) if as_json else table(found))
    if not survived or out:
        print(f"the runs and their logs: {folder}", file=sys.stderr)
    else:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    return 0 if survived else 1


def _parse(arguments: list[str], known: list[str]) -> tuple[list[str], int, str, bool]:
    """The faults, ranks, folder and whether JSON is wanted.

    Raises:
        InputError: an unknown word, or an option without its value.
    """
    words, names, options = list(arguments), [], {"--ranks": "0", "--out": ""}
    while words:
        word = words.pop(0)
        if word in options:
            if not words:
                raise InputError(f"{word}: wants a value; see `coatnet drill --help`")
            options[word] = words.pop(0)
        elif word.startswith("-") and word != "--json":
            raise unknown("option", word, [*options, "--json"])
        elif word != "--json":
            if word not in (*known, "all"):
                raise unknown("fault", word, [*known, "all"])
            names.append(word)
    if not options["--ranks"].isdecimal():
        raise InputError(f"--ranks {options['--ranks']}: must be a number; nearest valid: 2")
    if not names:
        raise InputError("coatnet drill: names no fault; `coatnet drill --help` lists them")
    wanted = known if "all" in names else list(dict.fromkeys(names))
    return wanted, int(options["--ranks"]), options["--out"], "--json" in arguments


def table(found: dict[str, Any]) -> str:
    """What was found, for a person."""
    rows: list[tuple[str, ...]] = [("fault", "survived", "noticed", "back", "exit", "repeated", "losses")]
    rows += [_cells(row) for row in found["results"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{row['fault']}: {row['problem']}" for row in found["results"] if row["problem"]]
    lines.append(f"{found['ranks']} x {found['device']}; the drill started the command again where it had ended (exit)")
    if found["ettr"]:
        costs, ratios = found["costs"], dict(found["ettr"])
        own = ratios.pop("drill")
        told = ", ".join(f"{ratio:.1%} at a failure every {hours}" for hours, ratio in ratios.items())
        lines.append(
            f"ETTR of these runs {own:.1%}; foretold {told} (noticed after {costs['detection']:.1f} s, restart "
            f"{costs['restart']:.1f} s, a save stops training {costs['stall']:.3f} s and counts {costs['write']:.3f} "
            f"s later)"
        )
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One fault's line."""
    if row["problem"] and row["detection"] is None:
        return (row["fault"], "NO", "", "", "", "", "")
    code = "ran on" if row["code"] is None else str(row["code"])
    seconds = (f"{row['detection']:.1f} s", f"{row['recovery']:.1f} s")
    return (row["fault"], "NO" if row["problem"] else "yes", *seconds, code, str(row["repeated"]), row["losses"])
