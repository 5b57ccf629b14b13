"""Two checkpoints compared: settings, small state, and every element, a stretch of a tensor in memory at a time.

They may come from any two layouts.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.run_json import flattened
from trainer.state.sources import Sources, buffers

STRETCH = 1 << 24  # elements compared at a time
BUFFERS = "buffers"  # the kind of BatchNorm's statistics, and of their averages
# Of state.json: what two good checkpoints of one step may differ in, and what is compared field by field.
ASIDE = ("run", "ledger", "goodput", "meters", "versions")


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What differs between two checkpoints that verify.

    Returns:
        steps: of both; config: [field, value in a, value in b] of the runs' settings; state: the same of the small
        state, but for figures and versions; only: names that one of them has alone, "a" or "b" first; tensors: kind,
        name, elements, differ (elements that are not equal), largest (difference) and scale (largest value in a) of
        each tensor that both have and that is not equal; equal: how many tensors are.
    """
    states = [json.loads((path / "state.json").read_text()) for path in (a, b)]
    left, right = (flattened(state.get("run", {})) for state in states)
    config = [[key, left.get(key), right.get(key)] for key in {**left, **right} if left.get(key) != right.get(key)]
    rest = [flattened({key: value for key, value in state.items() if key not in ASIDE}) for state in states]
    small = [[key, *(rows.get(key) for rows in rest)] for key in rest[0] | rest[1]]
    found: dict[str, Any] = {"steps": [state["step"] for state in states], "config": config}
    found |= {"state": [row for row in small if row[1] != row[2]], "only": [], "tensors": [], "equal": 0}
    for row in (*_fragments(a, b, found["only"]), *_buffers(a, b, found["only"])):
        if row["differ"]:
            found["tensors"].append(row)
        else:
            found["equal"] += 1
    return found


def _fragments(a: Path, b: Path, only: list[str]) -> list[dict[str, Any]]:
    """A row for each kind of each parameter that both hold."""
    one, other = Sources(a), Sources(b)
    only += _alone(one.kinds, other.kinds) + _alone(one.sizes, other.sizes)
    rows = []
    for name in one.sizes.keys() & other.sizes.keys():
        if one.sizes[name] != other.sizes[name]:
            only.append(f"{name}: {one.sizes[name]} elements in a, {other.sizes[name]} in b")
            continue
        for kind in set(one.kinds) & set(other.kinds):
            rows.append(_measured(kind, name, one, other))
    return sorted(rows, key=lambda row: (row["kind"], row["name"]))


def _measured(kind: str, name: str, one: Sources, other: Sources) -> dict[str, Any]:
    """The difference of one tensor."""
    row = _row(kind, name, one.sizes[name])
    for first in range(0, one.sizes[name], STRETCH):
        pair = [torch.empty(min(STRETCH, one.sizes[name] - first)) for _ in range(2)]
        for source, part in zip((one, other), pair, strict=True):
            source.fill(kind, name, first, part)
        _take(row, *pair)
    return row


def _buffers(a: Path, b: Path, only: list[str]) -> list[dict[str, Any]]:
    """A row for each running statistic that both hold."""
    one, other = ({name: value for _, name, value in buffers(path)} for path in (a, b))
    only += _alone(one, other)
    rows = []
    for name in sorted(one.keys() & other.keys()):
        x, y = one[name].reshape(-1).float(), other[name].reshape(-1).float()
        if len(x) != len(y):
            only.append(f"{name}: {len(x)} elements in a, {len(y)} in b")
            continue
        rows.append(_row(BUFFERS, name, len(x)))
        _take(rows[-1], x, y)
    return rows


def _row(kind: str, name: str, elements: int) -> dict[str, Any]:
    """A tensor of which nothing was compared yet."""
    return {"kind": kind, "name": name, "elements": elements, "differ": 0, "largest": 0.0, "scale": 0.0}


def _take(row: dict[str, Any], x: Tensor, y: Tensor) -> None:
    """Count in a stretch of a tensor; two values that are not numbers are equal, one alone is infinitely far off."""
    unequal = (x != y) & ~(x.isnan() & y.isnan())
    count = int(unequal.sum())
    if count:
        gap = (x[unequal].double() - y[unequal].double()).abs().nan_to_num(nan=math.inf)
        row["differ"] += count
        row["largest"] = max(row["largest"], float(gap.max()))
    if len(x):
        row["scale"] = max(row["scale"], float(x.abs().nan_to_num(nan=0.0, posinf=math.inf).max()))


def _alone(a: Any, b: Any) -> list[str]:
    """The names that one of two collections has alone."""
    return [f"a {name}" for name in sorted(set(a) - set(b))] + [f"b {name}" for name in sorted(set(b) - set(a))]
