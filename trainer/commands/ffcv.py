"""`coatnet data ffcv`: a split of a data set as one FFCV file."""

import sys

from configs.errors import InputError
from trainer.commands import words

FFCV_USAGE = """usage: coatnet data ffcv DIR --out FILE.beton [--split train|heldout] [--max-resolution N]
                        [--jpeg-quality Q] [--workers N]

Writes a split of the data set in DIR as FILE.beton, with FILE.beton.json beside it, which says what it was made from
and must go wherever it goes. Sample i is sample i of the split. FFCV encodes every picture anew as JPEG, so that
scores can differ a little from those over the tars.

--split              train if not said
--max-resolution N   store pictures with a longer side above N pixels at N; else as they are
--jpeg-quality Q     from 1 to 100; 90 if not said
--workers N          processes that encode; the file is the same with any number

`coatnet train RECIPE --data.path TRAIN.beton,HELDOUT.beton` trains from two of them, in the same order, with the same
labels, crops of the same draws and exact resume; `coatnet data verify FILE.beton` reads every byte again. All need
`pip install -e '.[ffcv]'`, which compiles FFCV, for which it needs Debian's libturbojpeg0-dev, libopencv-dev,
pkg-config and g++."""


def ffcv_command(arguments: list[str]) -> int:
    """`coatnet data ffcv DIR --out FILE.beton ...`; returns the exit code.

    Raises:
        InputError: words that do not fit, or see `data_pipeline.building.beton.write_beton`.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(FFCV_USAGE + "\n")
        return 0
    known = {"--out": 1, "--split": 1, "--max-resolution": 1, "--jpeg-quality": 1, "--workers": 1}
    options = words.options("coatnet data ffcv", arguments, known, places=1)
    if not options[""] or "--out" not in options:
        raise InputError("coatnet data ffcv: needs the data set's folder and --out FILE.beton")
    from data_pipeline.building.beton import Form, write_beton

    usual = Form()
    form = Form(
        words.whole(options, "--max-resolution", usual.max_resolution),
        words.whole(options, "--jpeg-quality", usual.jpeg_quality),
    )
    split = options.get("--split", ["train"])[0]
    print(write_beton(options[""][0], options["--out"][0], split, form, words.whole(options, "--workers", 1)))
    return 0
