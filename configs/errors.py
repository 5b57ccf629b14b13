"""The one family of errors that are the user's to mend. The command line maps them to exit code 76."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad configuration or data: says what is wrong, where, and what to do. Retrying will not help (exit 76)."""


def unknown(kind: str, given: str, known: Iterable[str]) -> InputError:
    """An error for a misspelt name, with the closest known ones: `unknown recipe 'x'; did you mean 'y'?`."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(name) for name in close) + "?" if close else "known: " + ", ".join(names)
    return InputError(f"unknown {kind} {given!r}; {hint}")
