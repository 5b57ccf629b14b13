"""The one family of errors that are the user's to mend. The command line maps them to exit code 76."""

import difflib
from collections.abc import Iterable
from datetime import datetime


class InputError(ValueError):
    """Bad configuration or data: says what is wrong, where, and what to do. Retrying will not help (exit 76)."""


def require(ok: bool, name: str, value: object, rule: str, nearest: object) -> None:
    """Refuse a value.

    Raises:
        InputError: naming the field, its value, the rule it breaks and the nearest valid value.
    """
    if not ok:
        raise InputError(f"{name} = {value!r}: {rule}; nearest valid: {nearest!r}")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse `value` outside [low, high], naming the nearer bound."""
    nearest = min(max(value, low), high)
    require(low <= value <= high, name, value, f"must be between {low:g} and {high:g}", nearest)


def at_least(name: str, value: float, low: float) -> None:
    """Refuse `value` below `low`."""
    require(value >= low, name, value, f"must be at least {low:g}", low)


def check_time(name: str, value: str) -> None:
    """Refuse what is neither empty nor a time: unix seconds, or a date and time of ISO 8601."""
    if value and not value.isdecimal():
        try:
            datetime.fromisoformat(value)
        except ValueError:
            nearest = datetime.now().astimezone().isoformat(timespec="minutes")
            require(False, name, value, "must be a time, in unix seconds or as year-month-dayThour:minute", nearest)


def unknown(kind: str, given: str, known: Iterable[str]) -> InputError:
    """An error for a misspelt name, with the closest known ones: `unknown recipe 'x'; did you mean 'y'?`."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(name) for name in close) + "?" if close else "known: " + ", ".join(names)
    return InputError(f"unknown {kind} {given!r}; {hint}")
