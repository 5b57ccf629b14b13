"""What may differ between a run and the state that it goes on from.

Some fields never matter to the mathematics and are free. The others must be the same, but for those that
`resume.allow` names; and some can never differ, because they shape the state or are what the data cursor counts in.
"""

from collections.abc import Iterable
from typing import Any

from configs.errors import InputError, unknown

FREE = (
    "name",
    "runs",
    "steps",
    "profile",
    "profile_trace",
    "data.path",
    "data.mixture",
    "data.workers",
    "data.cache",
    "data.cache_bytes",
    "data.fetch_retries",
    "data.on_damage",
    "data.damage_budget",
    "data.pipe",
    "parallel.",
    "checkpoint.",
    "resume.",
    "guard.",
    "evaluate.",
    "tracking.",
    "cluster.",
)
SHAPE = "it shapes the state; a new run takes the weights with --init.path"
CURSOR = "the data cursor counts in it; take the one the run began with, or a new run with --init.path"
FIXED = {
    "model.name": SHAPE,
    "model.resolution": SHAPE,
    "model.depths": SHAPE,
    "model.head_size": SHAPE,
    "model.relative_bias": SHAPE,
    "model.conv_norm": SHAPE,
    "data.global_batch": CURSOR,
    "data.lanes": CURSOR,
    "data.piece": CURSOR,
    "seed": CURSOR,
}
SCRATCH = "scratch"  # in `resume.allow`: begin anew where the run has checkpoints and none of them verifies
DATASET = "dataset"  # in `resume.allow`: another training split than the one the cursor was written for

Difference = tuple[str, Any, Any]  # dotted field, what it was, what it is


def check_allowed(allow: tuple[str, ...], fields: Iterable[str]) -> None:
    """Refuse names in `resume.allow` that mean nothing or can never be allowed.

    Raises:
        InputError: naming it, and why or what was meant.
    """
    names = list(fields)
    sections = {name.partition(".")[0] + "." for name in names if "." in name}
    for name in allow:
        if name in FIXED:
            raise InputError(f"resume.allow = {name!r}: can never differ: {FIXED[name]}")
        if name not in (*names, *sections, DATASET, SCRATCH):
            raise unknown("field in resume.allow:", name, [*names, *sections, DATASET, SCRATCH])


def differing(differences: Iterable[Difference]) -> list[Difference]:
    """Those of the differences that are not free."""
    return [row for row in differences if not row[0].startswith(FREE)]


def refuse(differences: Iterable[Difference], allow: tuple[str, ...], whose: str) -> list[Difference]:
    """Refuse what may not differ.

    Args:
        whose: begins the message, "runs/x belongs to another run" for example.

    Returns:
        The differences that were allowed.

    Raises:
        InputError: every difference that is not, and what would do.
    """
    changed = differing(differences)
    allowed = [row for row in changed if row[0] not in FIXED and {row[0], row[0].partition(".")[0] + "."} & set(allow)]
    left = [row for row in changed if row not in allowed]
    if not left:
        return allowed
    rows = "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in left)
    fixed = [f"{key} can never differ: {FIXED[key]}" for key, _, _ in left if key in FIXED]
    may = ["--resume.allow " + " ".join(key for key, _, _ in left)] if not fixed else []
    ways = ", or ".join(["Take the same settings to continue it", *may, "--name starts another run"])
    raise InputError(". ".join([f"{whose}: {rows}", *fixed, ways]))
