"""What `coatnet status` shows a person: a run's facts as a page of text, readable without colour."""

import time
from collections.abc import Sequence
from typing import Any

from configs.duration import clock


def page(found: dict[str, Any], training: Sequence[str] = (), now: float | None = None) -> str:
    """The facts for a person, without colours.

    Args:
        found: by `slurm.status.facts`.
        training: lines on how far it is, put in the middle.
        now: unix time; None: this moment.
    """
    now = time.time() if now is None else now
    lines = [f"{found['run']}: {found['state'].upper()}, {found['why']}"]
    lines += _rows(_job_lines(found)) + [f"  {line}" for line in training]
    rest: list[tuple[str, str]] = []
    saved = found["last_save"]
    if saved is not None:
        rest.append(("saved", f"step {saved['step']:,}, {clock(now - saved['time'])} ago"))
    if found["scores"]:
        rest.append(("scores", ", ".join(f"{name} {value:.4f}" for name, value in found["scores"].items())))
    if found["bad_nodes"]:
        rest.append(("bad nodes", ", ".join(found["bad_nodes"])))
    if found["slow_nodes"]:
        slow = [f"{host} ({times:.1f} times the others' time)" for host, times in found["slow_nodes"].items()]
        rest.append(("slow", ", ".join(slow)))
    rest += [("event", _event_line(event, now)) for event in found["events"]]
    return "\n".join(lines + _rows(rest))


def _rows(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a name and a text."""
    return [f"  {name:10s}{text}" for name, text in pairs]


def _job_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines on the job and its tries."""
    lines: list[tuple[str, str]] = []
    if found["jobs"]:
        lines.append(("job", ", ".join(f"{job} {state}" for job, state in found["jobs"].items())))
    if found["scheduler"]:
        lines.append(("job", f"not known: {found['scheduler']}"))
    if found["job_nodes"]:
        lines.append(("nodes", ", ".join(found["job_nodes"])))
    if found["try"]:
        failed = f", {found['crashes']} failures without progress" if found["crashes"] else ""
        lines.append(("try", found["try"] + failed))
    if found["world"]:
        lines.append(("on", f"{found['world']} x {found['device']}"))
    return lines


def _event_line(event: dict[str, Any], now: float) -> str:
    """One event in a line."""
    left_out = ("time", "event", "writer", "job", "try", "config")
    shown = [(name, value) for name, value in event.items() if name not in left_out]
    told = [(name, value) for name, value in shown if value is not False and value not in ("", [])]
    rest = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in told)
    return f"{clock(now - event['time'])} ago  {event['writer']}: {event['event']}  {rest}"[:160]
