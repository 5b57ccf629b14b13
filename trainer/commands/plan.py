"""`coatnet plan`: what a run will need and cost on machines that need not be here. Never imports torch."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import InputError, at_least, require
from configs.schema import Run

if TYPE_CHECKING:
    from trainer.planning.choose import Planner
    from trainer.planning.machines import Machines
    from trainer.planning.outlook import Job

GIGABIT = 1e9 / 8  # bytes/s
MOST = 1 << 20  # devices

PURPOSE = """Looks at every layout of RECIPE on N devices (pipeline x ZeRO x recomputation x micro-batch x offload x
compilation): memory, step time, and the whole run in days, device-hours, TPUv3-core-days, energy and money. The
fastest that fit are listed, and what speaks against the others; exit 76 if none fits, with what would. With several
numbers or a range A..B (doubled from A on) a scale study: strong and weak scaling, cost against time. Further words
are fields, as for `coatnet train`; nothing is started, and no data are needed."""


def plan_command(arguments: list[str]) -> int:
    """`coatnet plan RECIPE --gpus N ...`: returns the exit code."""
    from trainer.commands.config import Arguments, resolve_command
    from trainer.planning import answer, data_set, table

    parser = Arguments("plan RECIPE", PURPOSE)
    parser.add_argument("--gpus", help="N, N,N,... or A..B: devices of the run; with --gpu cpu its ranks")
    parser.add_argument("--gpu", help="h100, h200, a100, b200, rtx4090, ..., cpu, or FILE.json; else what is here")
    parser.add_argument("--nodes", type=int, help="machines that they are in; else as such devices are usually sold")
    parser.add_argument("--nic", type=float, default=400.0, help="Gb/s of network for each device; 400")
    parser.add_argument("--price", type=float, help="money for a device-hour; else cluster.price")
    parser.add_argument("--samples", type=int, help="of the training split, where the data are not here")
    parser.add_argument("--classes", type=int, help="of the data, where they are not here")
    parser.add_argument("--rates", type=Path, help="file or folder of `coatnet bench step`; else the user's own")
    parser.add_argument("--best", type=int, default=5, help="layouts that are listed; 5")
    parser.add_argument("--roofline", action="store_true", help="what one device could reach, stage by stage")
    parser.add_argument("--svg", type=Path, help="FILE.svg for the curves of a scale study")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    parsed = parser.parse_behind_recipe(arguments)
    if parsed is None:
        return 0
    options, fields = parsed
    _require_sane(options)
    run = _priced(resolve_command(arguments[0], fields), options.price)
    if options.gpus is None:
        parser.error("--gpus N says for how many devices")
    counts = counts_of(options.gpus)
    size = data_set.size(run, options.samples, options.classes)
    machines = _machines(options, max(counts))
    if options.roofline:
        return _roofline(run, size.classes, machines)
    rates = answer.rates_of(run, machines, options.rates)
    planner = answer.planner_of(run, size, machines, rates)
    job = answer.job_of(run, size)
    if len(counts) > 1:
        return _scaled(planner, job, counts, options)
    if options.svg is not None:
        raise InputError("--svg: the curves are those of a scale study; give --gpus several numbers, or A..B")
    found = answer.answer(planner, job, options.best)
    origin = rates["eager"].origin
    if options.json:
        print(json.dumps(answer.document(found, job, size, origin), indent=1))
    else:
        print(table.text(found, job, size, origin))
    return 0


def _roofline(run: Run, classes: int, machines: "Machines") -> int:
    """The ceilings of one device."""
    from models import spec
    from trainer.planning import ceiling

    batch = run.parallel.micro_batch or 64
    found = ceiling.ceiling(
        spec.of(run.model), run.model.resolution, classes, machines.device, batch, run.precision.dtype
    )
    print(ceiling.text(found))
    return 0


def _scaled(planner: "Planner", job: "Job", counts: list[int], options: argparse.Namespace) -> int:
    """A scale study."""
    from trainer.planning import scale
    from trainer.report.write import write

    found = scale.study(planner, job, counts)
    print(json.dumps(scale.document(found), indent=1) if options.json else scale.text(found))
    if options.svg is not None:
        print(f"wrote {write(options.svg, scale.picture(found))}", file=sys.stderr)
    return 0


def _require_sane(options: argparse.Namespace) -> None:
    """Refuse numbers that no machine and no price has.

    Raises:
        InputError: naming the option.
    """
    at_least("--best", options.best, 1)
    require(0 < options.nic < math.inf, "--nic", options.nic, "must be positive and finite, in Gb/s", 400)
    if options.price is not None:
        require(0 <= options.price < math.inf, "--price", options.price, "must be finite and not negative", 0)


def counts_of(words: str) -> list[int]:
    """The numbers of devices in `N`, `N,N,...` or `A..B`, ascending; of a range A, 2A, 4A, ... up to B.

    Raises:
        InputError: it is none of them.
    """
    low, dots, high = words.partition("..")
    try:
        counts = [int(low), int(high)] if dots else [int(word) for word in words.split(",")]
    except ValueError:
        raise InputError(f"--gpus {words}: must be N, N,N,... or A..B, such as 8..4096") from None
    require(all(1 <= count <= MOST for count in counts), "--gpus", words, f"must lie between 1 and {MOST}", 8)
    if not dots:
        return sorted(set(counts))
    first, last = counts
    require(first < last, "--gpus", words, "must ascend", f"{last}..{first}")
    return [first << times for times in range((last // first).bit_length())]


def _machines(options: argparse.Namespace, most: int) -> "Machines":
    """The machines that the options describe.

    Raises:
        InputError: no such device, or the devices do not fill so many machines.
    """
    from trainer.machine import devices
    from trainer.planning.machines import Machines

    name = options.gpu or devices.here()
    if name is None:
        raise InputError(
            f"--gpu: this machine has no GPU that the driver lists; name one of {', '.join(devices.DEVICES)}"
        )
    device = devices.named(name, most)
    if options.gpu is None:
        device = devices.of_this_machine(device)
    nodes = options.nodes
    if nodes is not None and (nodes < 1 or most % nodes):
        raise InputError(f"--nodes {nodes}: must divide the {most} devices; nearest valid: 1")
    if nodes is not None and nodes > 1 and device.on_host:
        raise InputError(f"--nodes {nodes}: `cpu` is this machine alone; nearest valid: 1")
    near = most // nodes if nodes is not None else device.per_node
    return Machines(device, most, near, options.nic * GIGABIT)


def _priced(run: Run, price: float | None) -> Run:
    """The run with another price."""
    return run if price is None else replace(run, cluster=replace(run.cluster, price=price))
