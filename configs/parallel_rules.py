"""Which settings of the layout go together. What does not is refused before anything starts, with why and what would.

Rules on one setting are in `configs/schema.py`; rules on the world size in `trainer/plan.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import InputError
from configs.schema import Run


@dataclass(frozen=True)
class Rule:
    """A combination that is refused.

    Attributes:
        field: the setting that the message is about, by its dotted name.
        broken: whether a run has the combination.
        why: the reason.
        nearest: a setting and its value that would do instead; "" as value is the empty string.
    """

    field: str
    broken: Callable[[Run], bool]
    why: str
    nearest: tuple[str, str]


def _remakes(run: Run) -> bool:
    """Whether a pipeline makes its stages again."""
    return run.parallel.pipeline > 1 and run.parallel.zero >= 2


RULES = (
    Rule(
        "parallel.compile",
        lambda run: run.parallel.compile and (run.parallel.offload == "nvme" or run.parallel.shard_group > 0),
        "parallel.offload nvme and parallel.shard_group need ZeRO-3, under which blocks cannot be compiled",
        ("parallel.compile", "False"),
    ),
    Rule(
        "parallel.compile",
        lambda run: run.parallel.compile and run.parallel.zero == 3,
        "under ZeRO-3 DeepSpeed gathers weights inside the blocks, where compiled code has none of its hooks",
        ("parallel.zero", "2"),
    ),
    Rule(
        "parallel.recompute",
        lambda run: run.parallel.compile and run.parallel.recompute == "selective",
        "cuts inside blocks, which parallel.compile makes one piece of",
        ("parallel.recompute", "full"),
    ),
    Rule(
        "parallel.recompute_impl",
        lambda run: run.parallel.recompute_impl == "fairscale" and _remakes(run),
        "under ZeRO-2 and 3 a pipeline makes whole stages again, and leaves no block to wrap",
        ("parallel.recompute_impl", "own"),
    ),
    Rule(
        "parallel.recompute",
        lambda run: run.parallel.recompute_impl == "fairscale" and run.parallel.recompute == "selective",
        "cuts inside blocks, which parallel.recompute_impl fairscale wraps whole",
        ("parallel.recompute", "full"),
    ),
    Rule(
        "parallel.recompute_impl",
        lambda run: run.parallel.recompute_impl == "fairscale" and run.parallel.recompute == "none",
        "nothing is recomputed under parallel.recompute none",
        ("parallel.recompute", "full"),
    ),
    Rule(
        "parallel.recompute_offload",
        lambda run: run.parallel.recompute_offload and _remakes(run),
        "under ZeRO-2 and 3 a pipeline makes whole stages again, and leaves no block whose inputs fairscale could move",
        ("parallel.recompute_offload", "False"),
    ),
    Rule(
        "parallel.recompute_offload",
        lambda run: run.parallel.recompute_offload and run.parallel.recompute_impl == "own",
        "only fairscale's wrapper keeps its inputs in the host's memory",
        ("parallel.recompute_impl", "fairscale"),
    ),
    Rule(
        "parallel.recompute",
        lambda run: _remakes(run) and run.parallel.recompute == "none",
        "under ZeRO-2 and 3 DeepSpeed follows one graph at a time, so that a pipeline makes its stages again",
        ("parallel.recompute", "full"),
    ),
    Rule(
        "parallel.offload",
        lambda run: run.parallel.offload == "nvme" and run.parallel.zero < 3,
        "DeepSpeed takes the state to a disk under ZeRO-3 only",
        ("parallel.zero", "3"),
    ),
    Rule(
        "parallel.offload",
        lambda run: run.parallel.offload == "cpu" and run.parallel.zero == 0,
        "DeepSpeed moves the state only where ZeRO divides it",
        ("parallel.zero", "1"),
    ),
    Rule(
        "parallel.offload_path",
        lambda run: run.parallel.offload == "nvme" and not run.parallel.offload_path,
        "parallel.offload nvme needs a folder on a local disk",
        ("parallel.offload_path", "/local"),
    ),
    Rule(
        "parallel.offload_path",
        lambda run: run.parallel.offload != "nvme" and run.parallel.offload_path != "",
        "nothing is written there without parallel.offload nvme",
        ("parallel.offload_path", ""),
    ),
    Rule(
        "precision.moments",
        lambda run: run.precision.moments == "bf16" and run.parallel.offload == "nvme",
        "DeepSpeed's files on the disk hold fp32 only",
        ("precision.moments", "fp32"),
    ),
    Rule(
        "parallel.shard_group",
        lambda run: run.parallel.shard_group == 1,
        "a copy of the weights cut over one rank is the whole of them, which is ZeRO-2",
        ("parallel.shard_group", "0"),
    ),
    Rule(
        "parallel.shard_group",
        lambda run: run.parallel.shard_group > 0 and run.parallel.pipeline > 1,
        "DeepSpeed makes such groups of the ranks of the whole run, not of a stage's",
        ("parallel.shard_group", "0"),
    ),
    Rule(
        "parallel.shard_group",
        lambda run: run.parallel.shard_group > 0 and run.parallel.offload != "none",
        "it keeps a second copy of the weights on the device, which parallel.offload takes them from",
        ("parallel.shard_group", "0"),
    ),
    Rule(
        "parallel.shard_group",
        lambda run: run.parallel.shard_group > 0 and run.parallel.zero < 3,
        "every rank has the whole weights below ZeRO-3",
        ("parallel.zero", "3"),
    ),
)


def check_parallel(run: Run) -> None:
    """Hold `RULES`, in their order.

    Raises:
        InputError: naming the field, its value, the reason and the nearest that works.
    """
    for rule in RULES:
        if rule.broken(run):
            name, value = rule.nearest
            section, _, field = rule.field.partition(".")
            given = getattr(getattr(run, section), field)
            raise InputError(f"{rule.field} = {given!r}: {rule.why}; nearest valid: {name} {value}")
