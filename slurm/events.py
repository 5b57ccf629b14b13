"""A run's event files, `events/WRITER.jsonl`: one writer each, so that nobody waits for a lock, merged when read."""

import json
import os
from pathlib import Path
from typing import Any

FIRST = 1 << 16  # bytes of each file's end that the first reading takes


class Reader:
    """What is new in all files since the last call; reads only what they gained."""

    def __init__(self, folder: Path) -> None:
        """Nothing read yet.

        Args:
            folder: the run's.
        """
        self._folder = folder / "events"
        self._read: dict[str, int] = {}

    def new(self) -> list[dict[str, Any]]:
        """New events in the order of their times, each with its `writer`; a line that is half written waits."""
        found: list[dict[str, Any]] = []
        try:
            entries = list(os.scandir(self._folder))
        except FileNotFoundError:
            return []
        for entry in entries:
            if entry.name.endswith(".jsonl"):
                size, begun = entry.stat().st_size, self._read.get(entry.name)
                if begun is None or size != begun:
                    found += self._gained(entry.name, begun, size)
        found.sort(key=lambda event: event["time"])
        return found

    def _gained(self, name: str, begun: int | None, size: int) -> list[dict[str, Any]]:
        """The whole lines that one file gained."""
        first = begun is None or begun > size  # a file that shrank was begun anew
        start = max(0, size - FIRST) if first or begun is None else begun
        with open(self._folder / name, "rb") as file:
            file.seek(start)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read[name] = start + len(whole)
        lines = whole.splitlines()[1 if first and start else 0 :]  # the first one may have been cut
        return [{**told, "writer": name[:-6]} for line in lines if (told := parsed(line)) is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """An event from its line; None for what a crash left."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return told if isinstance(told, dict) and isinstance(told.get("time"), int | float) else None


def tail(path: Path, size: int = FIRST) -> list[dict[str, Any]]:
    """The whole lines of JSON at a file's end, within so many bytes; none where there is no file."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 : -1]
    except FileNotFoundError:
        return []
    return [told for line in lines if (told := parsed(line)) is not None]
