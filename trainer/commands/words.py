"""The words of a command line as paths and options, for commands that set no fields of a run. No torch."""

from configs.errors import InputError, unknown


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
