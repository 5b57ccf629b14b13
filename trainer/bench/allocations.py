"""What the allocations in a trace of torch's profiler add up to: for a CPU, of which torch keeps no history."""

import json
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any

OPERATIONS = ("cpu_op", "user_annotation")
NAMED = 30  # operations that are named


def summary(trace: Path) -> dict[str, Any]:
    """The peak of what was allocated since the trace began, and which operations had allocated it.

    What was there before is in none of the figures; what of it was given back counts against them.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted(
        (float(event["ts"]), int(event["args"]["Addr"]), int(event["args"]["Bytes"]))
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    spans = sorted(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in OPERATIONS
    )
    held, peak, when = 0, 0, -1
    for number, (_, _, size) in enumerate(memory):
        held += size
        if held > peak:
            peak, when = held, number
    alive: dict[int, tuple[float, int]] = {}
    for moment, address, size in memory[: when + 1]:
        if size > 0:
            alive[address] = moment, size
        else:
            alive.pop(address, None)
    starts = [begin for begin, _, _ in spans]
    by: Counter[str] = Counter()
    for moment, size in alive.values():
        by[_operation(spans, bisect_right(starts, moment) - 1, moment)] += size
    return {"allocated_peak_bytes": peak, "allocations": len(memory), "alive_then": dict(by.most_common(NAMED))}


def _operation(spans: list[tuple[float, float, str]], last: int, moment: float) -> str:
    """The innermost operations that go on at a moment, the inner one last."""
    found: list[str] = []
    for place in range(last, max(-1, last - 400), -1):
        begin, end, name = spans[place]
        if begin <= moment <= end:
            found.append(name)
        if len(found) == 3:
            break
    return " > ".join(reversed(found)) or "outside of operations"
