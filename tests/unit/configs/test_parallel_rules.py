"""Every combination of the layout's settings is allowed, or refused with a reason and a way to an allowed one."""

import re
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from configs.errors import InputError
from configs.parallel_rules import RULES, check_parallel
from configs.run_json import convert
from configs.schema import Parallel, Precision, Run

VALUES: dict[str, tuple[Any, ...]] = {
    "pipeline": (1, 2),
    "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"),
    "recompute_impl": ("own", "fairscale"),
    "recompute_offload": (False, True),
    "offload": ("none", "cpu", "nvme"),
    "offload_path": ("", "/local"),
    "shard_group": (0, 1, 2),
    "compile": (False, True),
    "moments": ("fp32", "bf16"),
}
# What a run may ask for, said a second time: by what is asked, what else must be.
NEEDS: dict[str, Any] = {
    "compile": lambda c: not c["compile"] or (c["zero"] < 3 and c["recompute"] != "selective"),
    "stage recomputation": lambda c: c["pipeline"] == 1 or c["zero"] < 2 or c["recompute"] != "none",
    "fairscale": lambda c: (
        c["recompute_impl"] == "own" or (c["recompute"] == "full" and (c["pipeline"] == 1 or c["zero"] < 2))
    ),
    "inputs in the host's memory": lambda c: not c["recompute_offload"] or c["recompute_impl"] == "fairscale",
    "offload to the host": lambda c: c["offload"] != "cpu" or c["zero"] > 0,
    "offload to a disk": lambda c: c["offload"] != "nvme" or (c["zero"] == 3 and c["moments"] == "fp32"),
    "the disk's folder": lambda c: (c["offload"] == "nvme") == bool(c["offload_path"]),
    "shard group": lambda c: (
        c["shard_group"] == 0
        or (c["shard_group"] > 1 and c["zero"] == 3 and c["pipeline"] == 1 and c["offload"] == "none")
    ),
}
BASE = Run()
TABLE = [dict(zip(VALUES, values, strict=True)) for values in product(*VALUES.values())]
NEAREST = re.compile(r"^(\w+)\.(\w+) = .+: .{20,}; nearest valid: (parallel|precision)\.(\w+) (\S*)$")


def run_of(case: dict[str, Any]) -> Run:
    parallel = {name: value for name, value in case.items() if name != "moments"}
    return replace(BASE, parallel=Parallel(**parallel), precision=Precision(moments=case["moments"]))


def refused(run: Run) -> re.Match[str] | None:
    """The parts of the message, None for a run that is allowed."""
    try:
        check_parallel(run)
    except InputError as error:
        return NEAREST.match(str(error)) or pytest.fail(str(error))
    return None


def test_the_table_is_whole_and_every_combination_is_decided() -> None:
    assert len(TABLE) == 2 * 4 * 3 * 2 * 2 * 3 * 2 * 3 * 2 * 2
    wrong = [case for case in TABLE if (refused(run_of(case)) is None) != all(need(case) for need in NEEDS.values())]
    assert wrong == []


def test_what_is_named_as_the_nearest_leads_to_what_works() -> None:
    named: Counter[str] = Counter()
    for case in TABLE:
        run, seen = run_of(case), []
        while (found := refused(run)) is not None:
            section, field, text = found[3], found[4], found[5]
            before = getattr(getattr(run, section), field)
            value = {"True": True, "False": False}.get(text, int(text) if text.isdecimal() else text)
            assert (field, value) not in seen, f"{case}: turns in a circle at {found[0]}"
            seen.append((field, value))
            assert value != before, found[0]
            convert(field, value, type(before))
            run = replace(run, **{section: replace(getattr(run, section), **{field: value})})
            named[found[1] + "." + found[2]] += 1
    assert set(named) == {rule.field for rule in RULES}  # none is dead


def test_no_rule_is_behind_another() -> None:
    """Each is the first that some combination breaks."""
    firsts = {next((place for place, rule in enumerate(RULES) if rule.broken(run)), -1) for run in map(run_of, TABLE)}
    assert firsts == {-1, *range(len(RULES))}
