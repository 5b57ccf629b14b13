"""`coatnet trace`: proves from the traces of a run that its ranks cannot wait in a circle, and counts their bytes."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from trainer.stages import trace, wire
from trainer.stages.trace import Recorded

TRACE_USAGE = """usage: coatnet trace RUN [--json]

Checks what the ranks of the run folder RUN did with each other in their first steps, which a run with --parallel.trace
writes to RUN/trace: that all ranks of a group make the same calls in the same order, that every transfer has both
ends, and that the ranks could not wait for each other for ever even if every operation blocked. Then says what one
rank of each stage puts on the wire in a step, as recorded and by the formulas of trainer/stages/wire.py.

payload  the whole tensors; sent  what leaves the rank, if each collective goes round a ring
exit codes: 0 proven; 76 not, with the ranks and operations that clash"""


def trace_command(arguments: list[str]) -> int:
    """`coatnet trace RUN [--json]`: returns the exit code.

    Raises:
        TraceError: the run left no traces, or they show that ranks could wait for ever.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(TRACE_USAGE + "\n")
        return 0
    words = [word for word in arguments if word != "--json"]
    if len(words) != 1 or words[0].startswith("-"):
        raise InputError(f"coatnet trace: wants one run folder and nothing else, got {' '.join(words)!r}")
    folder = Path(words[0]) / "trace"
    traces = trace.load(folder)
    matched = trace.check({rank: found.program for rank, found in traces.items()})
    report = [_of_stage(found) for rank, found in sorted(traces.items()) if _first_of_stage(rank, found)]
    if "--json" in arguments:
        print(json.dumps({"ranks": len(traces), "matched": matched, "stages": report}))
        return 0
    print(f"{folder}: {len(traces)} ranks, {', '.join(traces[0].steps)}")
    print(f"{matched:,} collectives and transfers, each met by all its ranks; no circle of waits")
    for stage in report:
        print("\n" + _table(stage))
    return 0


def _first_of_stage(rank: int, found: Recorded) -> bool:
    """Whether a rank is the first replica of its stage."""
    return rank % int(found.facts["share"]["replicas"]) == 0


def _of_stage(found: Recorded) -> dict[str, Any]:
    """What a rank did in the last step recorded, and what it should have done."""
    share = wire.Share(**found.facts["share"])
    control = found.facts["control"]
    parts = list(found.steps)
    steps = [part for part in parts if part.startswith("step ")]
    if not steps:
        raise trace.TraceError(f"rank {found.facts['rank']}: not one step was recorded; run at least three")
    before = parts[: parts.index(steps[-1])][-1:]  # "after step N": an evaluation and a save belong there
    return {
        "stage": share.stage,
        "rank": found.facts["rank"],
        "step": steps[-1],
        "gathered_before": any("all_gather" in wire.counted(found.steps[part], control) for part in before),
        "recorded": wire.counted(found.steps[steps[-1]], control),
        "formulas": wire.expected(share),
        "purposes": [
            {"purpose": one.purpose, "kind": one.kind, "ranks": one.ranks, "payload": one.payload, "sent": one.sent}
            for one in wire.of_step(share)
        ],
    }


def _table(stage: Mapping[str, Any]) -> str:
    """The figures of a stage in aligned columns."""
    rows = [("operation", "for", "ranks", "payload", "sent")]
    rows += [
        (one["kind"], one["purpose"], str(one["ranks"]), _megabytes(one["payload"]), _megabytes(one["sent"]))
        for one in stage["purposes"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"stage {stage['stage']} (rank {stage['rank']}), one optimizer step by the formulas"]
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(cell.ljust(n) if place < 2 else cell.rjust(n) for place, (cell, n) in enumerate(cells)))
    for kind in sorted({*stage["recorded"], *stage["formulas"]}):
        seen, due = stage["recorded"].get(kind, 0), stage["formulas"].get(kind, 0)
        apart = f", {seen / due - 1:+.1%}" if due else ""
        lines.append(f"{kind}: {_megabytes(seen)} recorded in {stage['step']}, {_megabytes(due)} by formula{apart}")
    if stage["step"] in ("step 1", "step 2"):
        lines.append("ZeRO-3 gathers more in its first two steps, while it learns the order of modules")
    elif stage["gathered_before"]:
        lines.append(f"an evaluation before {stage['step']} left ZeRO-3's weights whole: it had less to gather")
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 1e6:,.3f} MB"
