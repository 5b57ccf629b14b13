"""The words of a command line as paths and options, for commands that set no fields of a run. No torch."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import InputError, unknown

if TYPE_CHECKING:
    from trainer.bench.record import Record

MANY = 1 << 30  # values of an option: any number


def parse(
    command: str, arguments: list[str], count: int, flags: tuple[str, ...], valued: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, str]]:
    """The paths and options of a command line; a flag's value is empty.

    Args:
        command: as the user wrote it, "coatnet export" for example.
        count: of paths, 1 or 2; 0: one or more.

    Raises:
        InputError: an unknown option, one without its value or given twice, or another number of paths.
    """
    words = iter([part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])])
    names: list[str] = []
    options: dict[str, str] = {}
    for word in words:
        if not word.startswith("-"):
            names.append(word)
            continue
        if word not in (*flags, *valued):
            raise unknown("option", word, (*flags, *valued))
        if word in options:
            raise InputError(f"{command}: {word} is given twice")
        options[word] = "" if word in flags else next(words, "")
        if word in valued and (not options[word] or options[word].startswith("--")):
            raise InputError(f"{word} needs a value; see `{command} --help`")
    if not names or (count and len(names) != count):
        wanted = ("one path or more", "one path", "two paths")[count]
        raise InputError(f"{command} takes {wanted}, not {len(names)}: {' '.join(names) or 'none given'}")
    return names, options


def options(command: str, arguments: list[str], known: dict[str, int], places: int = 0) -> dict[str, list[str]]:
    """Split words into options, each with up to its number of values; under "" are the words before any option.

    Args:
        command: as the user wrote it, "coatnet data build" for example.
        arguments: the words behind it.
        known: options and the number of their values: 0 for a switch, MANY for any number of them.
        places: how many words may stand alone.

    Raises:
        InputError: an unknown option, a value without one, or an option without a value or given twice.
    """
    found: dict[str, list[str]] = {"": []}
    current, room = "", places
    for word in arguments:
        if word.startswith("--"):
            if word not in known:
                raise unknown("option", word, known)
            if word in found:
                raise InputError(f"{word} is given twice; say it once")
            current, room = word, known[word]
            found[current] = []
        elif len(found[current]) == room and len(found[""]) < places:
            found[""].append(word)  # a place after an option that has all its values
        elif len(found[current]) == room:
            raise InputError(f"unexpected {word!r}; see `{command} --help`")
        else:
            found[current].append(word)
    for name, values in found.items():
        if name and known[name] and not values:
            raise InputError(f"{name} needs a value; see `{command} --help`")
    return found


def whole(options: dict[str, list[str]], name: str, default: int) -> int:
    """The whole number given with an option.

    Raises:
        InputError: it is none.
    """
    text = options.get(name, [str(default)])[0]
    if not text.isdecimal():
        raise InputError(f"{name} {text!r}: must be a whole number, such as {default or 128}")
    return int(text)


def at_least(options: dict[str, list[str]], least: dict[str, int]) -> dict[str, int]:
    """The whole numbers that were given with some options, under their names without dashes.

    Args:
        least: by option, the smallest that is valid.

    Raises:
        InputError: no number, or below the least.
    """
    found = {}
    for option, low in least.items():
        for word in options.get(option, []):
            if not word.isdecimal() or int(word) < low:
                raise InputError(f"{option} {word}: must be a whole number of at least {low}; nearest valid: {low}")
            found[option[2:]] = int(word)
    return found


def chosen(options: dict[str, list[str]], choices: dict[str, tuple[str, ...]]) -> None:
    """Refuse values that an option does not have, or has twice.

    Raises:
        InputError: naming the option and the nearest of its values.
    """
    for option, valid in choices.items():
        given = options.get(option, [])
        for word in given:
            if word not in valid:
                raise unknown(f"value of {option}", word, valid)
            if given.count(word) > 1:
                raise InputError(f"{option} {word} is given twice; leave one out")


def show(record: "Record", options: dict[str, list[str]]) -> None:
    """Print a record, as JSON if --json was given, and write it to the folder of --out."""
    if "--json" in options:
        print(json.dumps(asdict(record)))
    else:
        width = max(len(key) for key in record.summary)
        print("\n".join([record.command, *(f"{key:{width}}  {value}" for key, value in record.summary.items())]))
    if "--out" in options:
        print(f"wrote {record.write(Path(options['--out'][0]))}", file=sys.stderr)
