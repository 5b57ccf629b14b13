"""Axes: which numbers they name, how these are written, and where a value lies on the picture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Format = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """One axis from `low` to `high` over pixels from `begin` to `end`.

    Attributes:
        log: logarithmic; both ends are positive.
    """

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Pixels of a value."""
        low, high, value = (math.log10(max(one, 1e-300)) if self.log else one for one in (self.low, self.high, value))
        return self.begin + (value - low) / ((high - low) or 1.0) * (self.end - self.begin)

    def ticks(self, about: int) -> list[float]:
        """The numbers to name."""
        if self.log:
            return _decades(self.low, self.high)
        step = nice_step((self.high - self.low) / max(1, about))
        first = math.ceil(self.low / step - 1e-9)
        return [float(f"{number * step:.12g}") for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Sequence[float], begin: float, end: float, *, zero: bool = False, log: bool = False) -> Axis:
    """An axis that holds all values, with a little room.

    Args:
        values: finite.
        begin, end: pixels.
        zero: begin at 0.
        log: logarithmic where all values are positive and span more than a factor of 20; else linear after all.
    """
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 20:
        return Axis(low / 1.15, high * 1.15, begin, end, True)
    if zero and low >= 0:
        return Axis(0.0, high * 1.08 or 1.0, begin, end)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, begin, end)


def nice_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= step * (1 - 1e-9))


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, with their doubles and fives where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0,) if last - first > 3 else (1.0, 2.0, 5.0)
    step = max(1, (last - first) // 6)
    found = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
    return [value for value in found if low <= value <= high]


def short(value: float) -> str:
    """A number in few characters: 0.0005, 12, 3.4k, 1.5M, 2e-7."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{value:.3g}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share as a percentage, with a digit behind the point where it says something."""
    return f"{value:.0%}" if value == 0 or abs(value * 100 - round(value * 100)) < 0.005 else f"{value:.1%}"


def hours(value: float) -> str:
    """Hours as 12 min or 3.5 h or 2.1 d."""
    if value == 0:
        return "0"
    if value < 1 / 60:
        return f"{value * 3600:.3g} s"
    if value < 1:
        return f"{value * 60:.3g} min"
    return f"{value:.3g} h" if value < 48 else f"{value / 24:.3g} d"
