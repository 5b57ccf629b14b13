"""The words of a command line as paths and options, for commands that set no fields of a run. No torch."""

from configs.errors import InputError, unknown

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


def options(arguments: list[str], known: dict[str, int], places: int = 0) -> dict[str, list[str]]:
    """Split words into options, each with up to its number of values; under "" are the words before any option.

    Args:
        arguments: the words.
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
            raise InputError(f"unexpected {word!r}; see `coatnet data --help`")
        else:
            found[current].append(word)
    for name, values in found.items():
        if name and known[name] and not values:
            raise InputError(f"{name} needs a value; see `coatnet data --help`")
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
