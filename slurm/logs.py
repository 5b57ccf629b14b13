"""What the ranks' logs say: their ends, what was added to them since, the traceback that came first.

Python 3.9 and the standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

TAIL = 1 << 16  # bytes of a log's end that are read


def last_lines(path: Path, lines: int = 1) -> str:
    """The last lines of a log, empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def sizes(logs: list[Path]) -> dict[Path, int]:
    """How long each log is now."""
    return {log: log.stat().st_size if log.exists() else 0 for log in logs}


def added(logs: list[Path], since: dict[Path, int]) -> dict[int, str]:
    """What each rank's log has gained since `sizes`, by rank; nothing of a rank without a log."""
    found = {}
    for rank, log in enumerate(logs):
        if log.exists():
            with log.open("rb") as file:
                file.seek(since[log])
                found[rank] = file.read().decode(errors="replace")
    return found


def first_traceback(logs: list[Path], lines: int = 25) -> str:
    """The end of the log whose traceback came first, with its name; empty where none has one."""
    ends = [(log.stat().st_mtime, log) for log in logs if "Traceback" in last_lines(log, 60)]
    if not ends:
        return ""
    _, first = min(ends)
    return f"the end of {first}:\n{last_lines(first, lines)}"
