"""Rules inside `configs.schema.Data`: a pipe's command, and a mixture's entries and weights."""

import math
import shlex

from configs.errors import require

MAX_CYCLE = 4096  # positions in which a mixture gives every data set its share exactly


def check_pipe(command: str, paths: tuple[str, ...]) -> None:
    """Refuse a `data.pipe` that names no {url}, another placeholder, or that no URL would use.

    Raises:
        InputError: see above.
    """
    plain = command.replace("{url}", "").replace("{offset}", "")
    try:
        ok = not command or ("{url}" in " ".join(shlex.split(command)[1:]) and not {"{", "}", "\0"} & set(plain))
    except ValueError:  # a quote without its partner
        ok = False
    require(ok, "data.pipe", command, "must be a command with {url}, and may have {offset}", "curl -sf {url}")
    ok = not command or any("://" in path for path in paths)
    require(ok, "data.pipe", command, "fetches URLs, and data.path is none", "")


def mixture_entry(entry: str) -> tuple[str, int]:
    """Path and weight of an entry of `data.mixture`.

    Raises:
        InputError: not PATH:WEIGHT with a whole number from 1 to 999,999,999.
    """
    path, _, weight = entry.rpartition(":")
    good = bool(path) and weight.isascii() and weight.isdecimal() and 0 < int(weight[:19]) < 10**9
    rule = "must be PATH:WEIGHT, the weight a whole number from 1 to 999999999"
    require(good, "data.mixture", entry, rule, f"{path or entry or 'PATH'}:1")
    return path, int(weight)


def check_mixture(entries: tuple[str, ...]) -> None:
    """Refuse a data set that is named twice, and weights whose cycle is too long to look up.

    Raises:
        InputError: see above, or `mixture_entry`'s.
    """
    weights = dict(map(mixture_entry, entries))
    once = tuple(f"{path}:{weight}" for path, weight in weights.items())
    require(len(once) == len(entries), "data.mixture", entries, "must name a data set once", once)
    total, room = sum(weights.values()), MAX_CYCLE - len(weights)
    rule = f"the weights, in lowest terms, must add up to at most {MAX_CYCLE}"
    lighter = tuple(f"{path}:{max(1, weight * room // max(total, 1))}" for path, weight in weights.items())
    require(total <= MAX_CYCLE * math.gcd(*weights.values()), "data.mixture", entries, rule, lighter)
