"""`coatnet status RUN` and `coatnet cluster init`. Never imports torch."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import InputError
from slurm import clusters
from slurm.events import Reader
from slurm.page import page
from slurm.status import facts
from trainer.commands.config import Arguments
from trainer.tracking import live

AGAIN = 5.0  # seconds between two pages of --watch
PLAIN = "_.-=+*#@"  # a curve in ASCII
CLEAR = "\x1b[2J\x1b[H"  # of a terminal
OVER = ("done", "failed", "diverged")  # states that do not change any more by themselves


def run_folder(word: str) -> Path:
    """The run folder that a command names.

    Raises:
        InputError: it is none.
    """
    folder = Path(word)
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: not a run folder (it has no run.json); `coatnet train` makes them under runs/")
    return folder


def status_command(arguments: list[str]) -> int:
    """`coatnet status RUN [--json] [--watch]`: returns the exit code."""
    parser = Arguments("status", "What a run and its job are doing, from the run's folder and, for a job, from SLURM.")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument(
        "--watch", action="store_true", help=f"again every {AGAIN:.0f} seconds, until the run has ended"
    )
    options = parser.parse_strict(arguments)
    folder = run_folder(options.run)
    reader, shown = Reader(folder), list[Any]()
    while True:
        found = facts(folder, reader, shown)
        if options.json:
            text = json.dumps({**asdict(live.facts(folder)), **found})
        else:
            text = page(found, live.lines(folder)).translate(_shown())
        clear = CLEAR if options.watch and sys.stdout.isatty() and not options.json else ""
        print(clear + text, flush=True)
        if not options.watch or found["state"] in OVER:
            return 0
        time.sleep(AGAIN)


def _shown() -> dict[int, str]:
    """What stands for the characters of the loss's curve on a terminal that cannot show them."""
    try:
        live.BLOCKS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return {ord(block): plain for block, plain in zip(live.BLOCKS, PLAIN, strict=True)}
    return {}


def cluster_command(arguments: list[str]) -> int:
    """`coatnet cluster init [NAME]`: returns the exit code."""
    parser = Arguments("cluster", "Writes a first profile of this cluster, from sinfo, scontrol and sacctmgr.")
    parser.add_argument("action", choices=["init"])
    parser.add_argument("name", nargs="?", default="default", help="of the profile")
    options = parser.parse_strict(arguments)
    from slurm.discover import first_profile
    from slurm.job import write_whole

    path = clusters.folder() / f"{options.name}.toml"
    if path.exists():
        raise InputError(f"{path} exists; edit it, or give another name: coatnet cluster init NAME")
    text = first_profile()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    print(text)
    print(f"wrote {path}; `coatnet submit RECIPE --cluster {options.name} --nodes 1 --test-only` tries it")
    return 0
