"""`coatnet bench data`: what one core of this machine reads, decodes and crops of a data set."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from configs import resolve
from configs.errors import InputError, unknown

USAGE = """usage: coatnet bench data [DIR] [--against webdataset mosaicml energon ffcv] [--recipe RECIPE]
                          [--pictures 512] [--resolution 224] [--rounds 7] [--out FOLDER] [--json]

Times reading by offset with all checks, decoding, and the whole pipeline (random crop and flip) on the training split
of the data set in DIR, or on made-up JPEGs of 500 x 400 pixels and about 58 KB. One process, one thread, the process's
CPU time, the cases alternated round by round; "decode + crop alone" is torchvision's, over bytes in memory.

--against       others' readers over the same JPEGs, with torchvision's decoder and transforms: webdataset; mosaicml
                (pip install mosaicml-streaming), energon (pip install megatron-energon); ffcv, which writes them
                again as JPEGs of their full size and has a decoder and a crop of its own (pip install ffcv)
--recipe        time its augmentation and resolution too, and say how many such cores feed 8 H100s that train it
--pictures      samples read in a round, at most
--resolution    pixels of a crop's side
--out FOLDER    write a record there"""

OTHERS = ("webdataset", "mosaicml", "energon", "ffcv")
LEAST = {"--pictures": 64, "--resolution": 8, "--rounds": 1}
ONE = (*LEAST, "--recipe", "--out")
KNOWN = (*ONE, "--against", "--json")


def bench_data_command(arguments: list[str]) -> int:
    """`coatnet bench data ...`: returns the exit code."""
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(USAGE + "\n")
        return 0
    path, options = parse(arguments)
    recipe = resolve.load(options["--recipe"][0]) if "--recipe" in options else None
    from trainer.bench.data import Settings, measure

    numbers = {option[2:]: int(options[option][0]) for option in LEAST if option in options}
    settings = Settings(
        path=path,
        against=tuple(options.get("--against", ())),
        recipe=options.get("--recipe", [""])[0],
        **numbers,
    )
    record = measure(settings, recipe)
    if "--json" in options:
        print(json.dumps(asdict(record)))
    else:
        width = max(len(key) for key in record.summary)
        print("\n".join([record.command, *(f"{key:{width}}  {value}" for key, value in record.summary.items())]))
    if "--out" in options:
        print(f"wrote {record.write(Path(options['--out'][0]))}", file=sys.stderr)
    return 0


def parse(words: list[str]) -> tuple[str, dict[str, list[str]]]:
    """The data set's folder, empty if none is given, and the values of each option.

    Raises:
        InputError: an option or a value that there is not, a word too many, or an option without its value.
    """
    options: dict[str, list[str]] = {}
    paths, current = [], ""
    for word in words:
        if word.startswith("--"):
            if word not in KNOWN:
                raise unknown("option", word, KNOWN)
            if word in options:
                raise InputError(f"{word} is given twice; list its values behind one, or leave one out")
            current, options[word] = word, []
        elif current in ("", "--json") or (current in ONE and options[current]):
            paths.append(word)
        else:
            options[current].append(word)
    if len(paths) > 1:
        raise InputError(f"unexpected {paths[1]!r}: coatnet bench data takes one folder; see --help")
    for option, values in options.items():
        if not values and option != "--json":
            raise InputError(f"{option} needs a value; see `coatnet bench data --help`")
    for option, least in LEAST.items():
        value = options.get(option, [str(least)])[0]
        if not value.isdecimal() or int(value) < least:
            raise InputError(f"{option} {value}: must be a whole number of at least {least}; nearest valid: {least}")
    against = options.get("--against", [])
    for name in against:
        if name not in OTHERS:
            raise unknown("value of --against", name, OTHERS)
    if len(set(against)) != len(against):
        raise InputError(f"--against {' '.join(against)}: names a reader twice; leave one out")
    return "".join(paths), options
