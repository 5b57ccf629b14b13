"""Files of JSON lines: one to which a thread adds a line every few seconds, also while a collective hangs; reading."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Adds what `line` gives to a file of JSON lines until it is closed."""

    def __init__(self, path: Path, line: Callable[[], dict[str, Any]], every: float, at_once: bool = True) -> None:
        """Begin.

        Args:
            path: of the file; its folder is made.
            line: one line's facts, called from the thread.
            every: seconds between two lines.
            at_once: write the first one now.
        """
        self._path, self._line, self._every = path, line, every
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._whole = _ends_whole(path)
        if at_once:
            self.write()
        self._thread = threading.Thread(target=self._run, name=path.stem, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last line."""
        self._ended.set()
        self._thread.join()
        self.write()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self.write()

    def write(self) -> None:
        """Add a line now; where the disk refuses, it is left out, and the next begins a line of its own."""
        with self._lock:
            text = json.dumps(self._line()) + "\n"
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="ascii") as file:
                    file.write(text if self._whole else "\n" + text)
                self._whole = True
            except OSError:
                self._whole = False


def _ends_whole(path: Path) -> bool:
    """Whether what is added to a file begins a new line."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            return file.read() in (b"", b"\n")
    except OSError:  # there is none, or none can be written
        return True


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON; none where it is not there; one that a crash left half written is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]
