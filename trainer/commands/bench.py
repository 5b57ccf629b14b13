"""`coatnet bench model`: the speed and memory of a training step on this machine; the others: their own files."""

import sys
from typing import TYPE_CHECKING, cast

from configs.errors import unknown
from trainer.commands import bench_blocks, bench_data, bench_step, words

if TYPE_CHECKING:
    from models.activations import Device, Dtype, Recompute
    from models.design import Stride

USAGE = """usage: coatnet bench model [NAME] [--against timm] [--batch 16] [--resolution 224]
                           [--stride expansion|depthwise] [--dtype bf16 ...] [--recompute none ...]
                           [--compiled ours timm] [--rounds 7] [--threads 1] [--device cpu|cuda] [--out FOLDER] [--json]

Times training steps (forward, loss, backward, fused AdamW; channels_last) of NAME, coatnet0 if not given, on one
made-up batch. Several dtypes and kinds of recomputation are alternated round by round.

--against timm  alternate with timm's network of the same function, the same weights, and the stride in the same place
--dtype         fp32, bf16 (autocast) or both
--recompute     none, selective, full: one or more; bytes held for the backward pass are measured for each
--compiled      ours, timm or both: torch.compile's translation of them too, ours block by block as in training
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
    "--compiled": ("ours", "timm"),
    "--device": ("cpu", "cuda"),
}
LEAST = {"--batch": 2, "--resolution": 32, "--rounds": 1, "--threads": 1}
SEVERAL = ("--dtype", "--recompute", "--compiled")
KNOWN = dict.fromkeys((*CHOICES, *LEAST, "--out"), 1) | {"--json": 0} | dict.fromkeys(SEVERAL, words.MANY)


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
    options = words.options("coatnet bench model", arguments[1:], KNOWN, places=1)
    words.chosen(options, CHOICES)
    numbers = words.at_least(options, LEAST)
    from trainer.bench.model import Settings, measure

    defaults = Settings()
    settings = Settings(
        name="".join(options[""]) or defaults.name,
        against_timm="--against" in options,
        stride=cast("Stride | None", options.get("--stride", [None])[0]),
        dtypes=cast("tuple[Dtype, ...]", tuple(options.get("--dtype", defaults.dtypes))),
        recompute=cast("tuple[Recompute, ...]", tuple(options.get("--recompute", defaults.recompute))),
        compiled=tuple(options.get("--compiled", ())),
        device=cast("Device", options.get("--device", [defaults.device])[0]),
        **numbers,
    )
    record = measure(settings)
    words.show(record, options)
    return 0
