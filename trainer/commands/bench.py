"""`coatnet bench model`: the speed and memory of a training step on this machine; the others: their own files."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from configs.errors import InputError, unknown
from trainer.commands import bench_blocks, bench_data, bench_step

if TYPE_CHECKING:
    from models.activations import Device, Dtype, Recompute
    from models.design import Stride

USAGE = """usage: coatnet bench model [NAME] [--against timm] [--batch 16] [--resolution 224]
                           [--stride expansion|depthwise] [--dtype bf16 ...] [--recompute none ...]
                           [--rounds 7] [--threads 1] [--device cpu|cuda] [--out FOLDER] [--json]

Times training steps (forward, loss, backward, fused AdamW; channels_last) of NAME, coatnet0 if not given, on one
made-up batch. Several dtypes and kinds of recomputation are alternated round by round.

--against timm  alternate with timm's network of the same function, the same weights, and the stride in the same place
--dtype         fp32, bf16 (autocast) or both
--recompute     none, selective, full: one or more; bytes held for the backward pass are measured for each
--rounds        measured steps of each case; ratios are medians over the rounds
--threads       of torch on a CPU. With 1 a step is timed by the process's CPU time, else by the clock
--out FOLDER    write a record there, such as model-coatnet0-bf16-expansion.json

`coatnet bench data --help`: the same of the data pipeline; `coatnet bench blocks --help`: of each block by itself;
`coatnet bench step --help`: of whole training steps, from which the planner learns how fast this machine is."""

CHOICES = {
    "--against": ("timm",),
    "--stride": ("expansion", "depthwise"),
    "--dtype": ("fp32", "bf16"),
    "--recompute": ("none", "selective", "full"),
    "--device": ("cpu", "cuda"),
}
NUMBERS = {"--batch": 2, "--resolution": 32, "--rounds": 1, "--threads": 1}  # and the least of each
MANY = ("--dtype", "--recompute")
KNOWN = (*CHOICES, *NUMBERS, "--out", "--json")


def bench_command(arguments: list[str]) -> int:
    """`coatnet bench model|data|blocks|step ...`: returns the exit code."""
    if arguments[:1] == ["data"]:
        return bench_data.bench_data_command(arguments[1:])
    if arguments[:1] == ["blocks"]:
        return bench_blocks.bench_blocks_command(arguments[1:])
    if arguments[:1] == ["step"]:
        return bench_step.bench_step_command(arguments[1:])
    if not arguments or "-h" in arguments or "--help" in arguments:
        sys.stdout.write(USAGE + "\n")
        return 0
    if arguments[0] != "model":
        raise unknown("bench command", arguments[0], ("model", "data", "blocks", "step"))
    name, options = parse(arguments[1:])
    from trainer.bench.model import Settings, measure

    defaults = Settings()
    numbers = {option[2:]: number(option, options[option][0]) for option in NUMBERS if option in options}
    settings = Settings(
        name=name or defaults.name,
        against_timm="--against" in options,
        stride=cast("Stride | None", options.get("--stride", [None])[0]),
        dtypes=cast("tuple[Dtype, ...]", tuple(options.get("--dtype", defaults.dtypes))),
        recompute=cast("tuple[Recompute, ...]", tuple(options.get("--recompute", defaults.recompute))),
        device=cast("Device", options.get("--device", [defaults.device])[0]),
        **numbers,
    )
    record = measure(settings)
    if "--json" in options:
        print(json.dumps(asdict(record)))
    else:
        width = max(len(key) for key in record.summary)
        print("\n".join([record.command, *(f"{key:{width}}  {value}" for key, value in record.summary.items())]))
    if "--out" in options:
        print(f"wrote {record.write(Path(options['--out'][0]))}", file=sys.stderr)
    return 0


def parse(words: list[str]) -> tuple[str, dict[str, list[str]]]:
    """The model's name, empty if none is given, and the values of each option.

    Raises:
        InputError: an option or a value that there is not, a word too many, or an option without its value.
    """
    options: dict[str, list[str]] = {}
    names, current = [], ""
    for word in words:
        if word.startswith("--"):
            if word not in KNOWN:
                raise unknown("option", word, KNOWN)
            if word in options:
                raise InputError(f"{word} is given twice; list its values behind one, or leave one out")
            current, options[word] = word, []
        elif not current or current == "--json" or (options[current] and current not in MANY):
            names.append(word)
        else:
            if word not in CHOICES.get(current, (word,)):
                raise unknown(f"value of {current}", word, CHOICES[current])
            if word in options[current]:
                raise InputError(f"{current} {word} is given twice; leave one out")
            options[current].append(word)
    if len(names) > 1:
        raise InputError(f"unexpected {names[1]!r}: coatnet bench model takes one model; see --help")
    for option, values in options.items():
        if not values and option != "--json":
            raise InputError(f"{option} needs a value; see `coatnet bench --help`")
    return "".join(names), options


def number(option: str, word: str) -> int:
    """The whole number behind an option.

    Raises:
        InputError: no number, or below the least.
    """
    least = NUMBERS[option]
    if not word.isdecimal() or int(word) < least:
        raise InputError(f"{option} {word}: must be a whole number of at least {least}; nearest valid: {least}")
    return int(word)
