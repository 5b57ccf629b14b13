"""Where the network is cut into the stages of a pipeline: even shares of the flat list of blocks. No torch.

A cut is a function of the run, the classes and the micro-batch alone, so that every rank and a planner elsewhere find
the same one. `parallel.balance` says what is made even, `parallel.partition_impl` who cuts.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

from configs.errors import InputError, unknown
from configs.schema import Model, Run
from models import cost, spec
from models.activations import BlockBytes, Device, Dtype, Recompute
from trainer.machine.extras import require_fairscale

BALANCES = ("compute", "parameters", "activations")

# As long as an H100 moves what belongs to one byte kept for the backward pass (about 4.6 bytes, read and written
# forward and backward by point-wise kernels that are fused, at 3.0 TB/s), it makes so many multiply-adds (each again
# twice in the backward pass, at 790 TFLOP/s). A counted figure, not a measured one; `coatnet bench blocks` measures.
MULTIPLY_ADDS_PER_BYTE = 200

# Forward passes that a step of a stage takes as long as, its backward pass being two of them: with the forward pass
# made again, and without. The last stage of a pipeline that remakes its stages goes on to its backward pass at once.
REMADE, ONCE = 4, 3

PATIENCE = 10  # seconds for fairscale's solver, which takes a hundredth of one where it comes to an end
_SOLVE = """
import json, runpy, sys
costs, count = json.load(sys.stdin)
print(json.dumps([len(part) for part in runpy.run_path(sys.argv[1])["solve"](costs, count)]))
"""


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of the network's flat list that one rank of a pipeline holds.

    Attributes:
        first, last: blocks [first, last) of the list.
        parameters: of its blocks.
        share: of the network's forward multiply-adds.
        boundary_bytes: what it sends to the next stage for one micro-batch; 0 for the last stage.
        activation_bytes: what it keeps of one micro-batch in flight, between its forward and its backward pass: of a
            stage that is remade the input, else what `parallel.recompute` leaves of its blocks.
        load: its share of what the cut makes even.
        blocks: the names of its blocks.
    """

    first: int
    last: int
    parameters: int
    share: float
    boundary_bytes: int
    activation_bytes: int
    load: float
    blocks: tuple[str, ...]


def remakes(run: Run) -> bool:
    """Whether the stages of a pipeline keep their inputs only, and make their forward passes again (ZeRO-2/3)."""
    return run.parallel.pipeline > 1 and run.parallel.zero >= 2


def inside(run: Run) -> Recompute:
    """What is made again inside a pass that has gradients: where whole stages are, "full" does no more than that."""
    return "none" if remakes(run) and run.parallel.recompute == "full" else run.parallel.recompute


def stages(run: Run, classes: int, micro_batch: int) -> tuple[Stage, ...]:
    """The `parallel.pipeline` stages of the run's network, none of them empty.

    Args:
        classes: outputs of the classifier.
        micro_batch: samples of one pass through a stage.

    Raises:
        InputError: more stages than blocks; an unknown balance, or a file of it that does not fit the network;
            fairscale is wanted, and missing or without an answer.
    """
    counts = cost.count(spec.of(run.model), run.model.resolution, classes=classes)
    names = [block.name for block in counts.blocks]
    kept = block_bytes(run, classes, micro_batch, inside(run))
    sent = [micro_batch * block.boundary for block in kept]
    costs, weights = block_costs(run, classes, micro_batch), stage_weights(run)
    parts = list(pairwise((0, *ends(run, classes, micro_batch))))
    loads = [weight * sum(costs[first:last]) for weight, (first, last) in zip(weights, parts, strict=True)]
    inputs = [block.saved for block in block_bytes(run, classes, micro_batch, "full")]
    return tuple(
        Stage(
            first=first,
            last=last,
            parameters=sum(block.parameters for block in counts.blocks[first:last]),
            share=sum(block.multiply_adds for block in counts.blocks[first:last]) / counts.multiply_adds,
            boundary_bytes=sent[last - 1] if last < len(names) else 0,
            activation_bytes=(
                inputs[first] if remakes(run) and last < len(names) else sum(block.saved for block in kept[first:last])
            ),
            load=loads[number] / sum(loads),
            blocks=tuple(names[first:last]),
        )
        for number, (first, last) in enumerate(parts)
    )


def ends(run: Run, classes: int, micro_batch: int) -> tuple[int, ...]:
    """The ends of the stages in the flat list of blocks.

    Raises:
        InputError: see `stages`.
    """
    blocks = block_bytes(run, classes, 1, "none")
    count = run.parallel.pipeline
    if count > len(blocks):
        raise InputError(
            f"parallel.pipeline = {count}: {run.model.name} has only {len(blocks)} blocks to cut between; nearest "
            f"valid: {len(blocks)}"
        )
    if count == 1:
        return (len(blocks),)
    costs = tuple(block_costs(run, classes, micro_batch))
    if run.parallel.partition_impl == "fairscale":
        return fairscale_cuts(costs, count)
    # What a boundary sends grows with the micro-batch everywhere alike, and so does not change the choice.
    return _remembered_cuts(costs, tuple(block.boundary for block in blocks), count, tuple(stage_weights(run)))


def stage_weights(run: Run) -> list[int]:
    """How much of every stage's costs counts, in whole numbers: the last of a pipeline makes no forward pass again.

    Only time is spent so: what a stage holds does not depend on it.
    """
    timed = run.parallel.balance not in ("parameters", "activations")
    ends = ONCE if timed and remakes(run) else REMADE
    return [REMADE] * (run.parallel.pipeline - 1) + [ends]


def table(found: Sequence[Stage]) -> str:
    """The stages in aligned columns, for the log. Compute: forward multiply-adds; balance: what the cut makes even."""
    rows = [("stage", "blocks", "parameters", "compute", "balance", "sends", "keeps")]
    rows += [
        (
            str(number),
            f"{stage.blocks[0]} .. {stage.blocks[-1]} ({len(stage.blocks)})",
            f"{stage.parameters / 1e6:.2f} M",
            f"{stage.share:.1%}",
            f"{stage.load:.1%}",
            f"{stage.boundary_bytes / 1e6:.2f} MB",
            f"{stage.activation_bytes / 1e6:.1f} MB",
        )
        for number, stage in enumerate(found)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place == 1 else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )


def block_costs(run: Run, classes: int, micro_batch: int) -> list[int]:
    """What `parallel.balance` makes even, block by block, in whole numbers above zero.

    compute: forward multiply-adds, and for every byte that a block keeps without recomputation MULTIPLY_ADDS_PER_BYTE
    more. Norms, GELUs and depthwise convolutions have next to no multiply-adds, and take most of the early blocks'
    time moving bytes: by multiply-adds alone the first stage would be the slowest by far.
    parameters: their number. activations: bytes that a micro-batch keeps of a block while its stage is at work. A file:
    nanoseconds. A stage's time is not the sum of its blocks' where it is made again, see `stage_weights`.

    Raises:
        InputError: see `stages`.
    """
    balance = run.parallel.balance
    counts = cost.count(spec.of(run.model), run.model.resolution, classes=classes).blocks
    if balance == "parameters":
        return [block.parameters for block in counts]
    if balance == "activations":
        return [block.saved for block in block_bytes(run, classes, micro_batch, inside(run))]
    if balance == "compute":
        # What a second picture adds: casts of weights, which are kept too, do not grow with the batch.
        one, two = (block_bytes(run, classes, batch, "none") for batch in (1, 2))
        moved = [more.saved - less.saved for less, more in zip(one, two, strict=True)]
        return [block.multiply_adds + MULTIPLY_ADDS_PER_BYTE * size for block, size in zip(counts, moved, strict=True)]
    if not balance.endswith(".json"):
        raise unknown("parallel.balance", balance, (*BALANCES, "FILE.json"))
    seconds = read_seconds(Path(balance), [block.name for block in counts])
    return [max(1, round(Fraction(value) * 10**9)) for value in seconds]


def read_seconds(path: Path, names: Sequence[str]) -> list[float]:
    """The seconds of each block, in the order of `names`, from a file of `coatnet bench blocks`.

    Raises:
        InputError: it cannot be read, or is not one positive finite number for each block and no other.
    """
    where = f"parallel.balance = '{path}'"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read as JSON: {error}; `coatnet bench blocks` writes one") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: must be an object {{block: seconds}}, as `coatnet bench blocks` writes it")
    missing = [name for name in names if name not in found]
    strange = [name for name in found if name not in names]
    if missing or strange:
        wrong = [f"lacks {', '.join(missing[:3])}"] if missing else []
        wrong += [f"has {', '.join(map(repr, strange[:3]))}, no block of the network"] if strange else []
        raise InputError(
            f"{where}: {'; '.join(wrong)}: it must have exactly the network's {len(names)} blocks; measure this recipe "
            f"with `coatnet bench blocks`"
        )
    for name in names:
        if not _positive(found[name]):
            raise InputError(f"{where}: {name} = {found[name]!r}: must be a positive finite number of seconds")
    return [found[name] for name in names]


def cuts(costs: Sequence[int], sent: Sequence[int], count: int, weights: Sequence[int] = ()) -> tuple[int, ...]:
    """The ends of `count` contiguous stages whose largest load is the least there can be.

    A load is the stage's weight times the costs of its blocks. Of all such cuts the one with the least sum of squared
    loads, then the fewest bytes sent over all boundaries, then the earliest ends.

    Args:
        costs: of each block, above zero.
        sent: bytes that go from each block to the next.
        count: stages, at most as many as blocks.
        weights: of each stage, above zero; empty: all the same.
    """
    upto, blocks, weights = [0, *accumulate(costs)], len(costs), weights or [1] * count
    limit = _least_largest(upto, weights)
    # For each number of first blocks: (squares, bytes, ends) of the best way to cut them into the stages so far. Both
    # sums grow by what a stage adds, so that the best whole begins with a best part; a maximum would not do that.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage, weight in enumerate(weights, 1):
        longer = {}
        for last in range(stage, blocks - count + stage + 1):
            leaving = sent[last - 1] if last < blocks else 0
            ways = [
                (squares + (weight * (upto[last] - upto[first])) ** 2, crossed + leaving, (*ends, last))
                for first, (squares, crossed, ends) in best.items()
                if first < last and weight * (upto[last] - upto[first]) <= limit
            ]
            if ways:
                longer[last] = min(ways)
        best = longer
    return best[blocks][2]


@lru_cache(maxsize=512)
def _remembered_cuts(
    costs: tuple[int, ...], sent: tuple[int, ...], count: int, weights: tuple[int, ...]
) -> tuple[int, ...]:
    """`cuts`, once for each question: a planner asks the same ones for many layouts."""
    return cuts(costs, sent, count, weights)


def fairscale_cuts(costs: Sequence[int], count: int) -> tuple[int, ...]:
    """The ends of the stages as fairscale's block partition finds them.

    It moves blocks between neighbours until the largest and the smallest stage differ by no more than a block. On some
    costs it goes round in circles (0.4.13: six blocks of cost 1, 1, 1, 1, 2, 2 in five stages), so that it runs in a
    process that can be ended. That process reads its one file alone, which needs no torch.

    Raises:
        InputError: fairscale is missing, its solver finds no end, or it leaves a stage without a block.
    """
    file = require_fairscale("partition_impl") / "nn" / "pipe" / "balance" / "blockpartition.py"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _SOLVE, str(file)],
            input=json.dumps([list(costs), count]),
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"parallel.partition_impl = 'fairscale': its solver found no cut into {count} stages within {PATIENCE} s; "
            f"nearest valid: 'own'"
        ) from None
    sizes: list[int] = json.loads(done.stdout)
    if 0 in sizes:
        raise InputError(
            f"parallel.partition_impl = 'fairscale': its solver leaves stage {sizes.index(0)} of {count} without a "
            f"block; nearest valid: 'own'"
        )
    return tuple(accumulate(sizes))


def _least_largest(upto: Sequence[int], weights: Sequence[int]) -> int:
    """The least that the largest of so many non-empty stages can load; `upto` has the costs of the first blocks."""
    blocks, count = len(upto) - 1, len(weights)
    best = {0: 0}  # for each number of first blocks, cut into the stages so far
    for stage, weight in enumerate(weights, 1):
        best = {
            last: min(
                max(largest, weight * (upto[last] - upto[first])) for first, largest in best.items() if first < last
            )
            for last in range(stage, blocks - count + stage + 1)
        }
    return best[blocks]


def block_bytes(
    run: Run, classes: int, batch: int, recompute: Recompute, device: Device | None = None
) -> tuple[BlockBytes, ...]:
    """Bytes of every block for passes of `batch` samples.

    Args:
        device: None: CUDA unless the run is for a CPU, wherever this runs: a cut must not depend on the machine.
    """
    at = device or ("cpu" if run.cluster.device == "cpu" else "cuda")
    return _remembered_bytes(run.model, classes, batch, recompute, run.precision.dtype, at)


@lru_cache(maxsize=1024)
def _remembered_bytes(
    model: Model, classes: int, batch: int, recompute: Recompute, dtype: Dtype, device: Device
) -> tuple[BlockBytes, ...]:
    """`block_bytes`, once for each question."""
    return cost.activations(
        spec.of(model),
        model.resolution,
        batch=batch,
        dtype=dtype,
        recompute=recompute,
        attention=model.attention,
        device=device,
        classes=classes,
    )


def _positive(value: object) -> bool:
    """Whether a value of a JSON file is a positive finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
