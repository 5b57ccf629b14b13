"""`coatnet bench data`: what one core of this machine reads, decodes and crops of a data set."""

import sys

from configs import resolve
from trainer.commands import words

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
KNOWN = dict.fromkeys((*LEAST, "--recipe", "--out"), 1) | {"--against": words.MANY, "--json": 0}


def bench_data_command(arguments: list[str]) -> int:
    """`coatnet bench data ...`: returns the exit code."""
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(USAGE + "\n")
        return 0
    options = words.options("coatnet bench data", arguments, KNOWN, places=1)
    words.chosen(options, {"--against": OTHERS})
    numbers = words.at_least(options, LEAST)
    recipe = resolve.load(options["--recipe"][0]) if "--recipe" in options else None
    from trainer.bench.data import Settings, measure

    settings = Settings(
        path="".join(options[""]),
        against=tuple(options.get("--against", ())),
        recipe=options.get("--recipe", [""])[0],
        **numbers,
    )
    record = measure(settings, recipe)
    words.show(record, options)
    return 0
