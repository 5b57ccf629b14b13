"""From the labels of a source, which are words, to indices: the vocabulary, the hierarchy, single or multi."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, unknown
from data_pipeline.manifest import LabelKind

MAX_CLASSES = 1_000_000
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Labels:
    """What a source's words mean: `indices` gives the classes of each word, its ancestors included."""

    vocabulary: tuple[str, ...]
    indices: Mapping[str, tuple[int, ...]]

    def of(self, words: Iterable[str]) -> tuple[int, ...]:
        """The classes of a picture, each once, in order."""
        return tuple(sorted({index for word in words for index in self.indices[word]}))


def understand(words: Iterable[str], given: Sequence[str], parents: Mapping[str, Sequence[str]]) -> Labels:
    """The vocabulary, and the classes of each of `words`.

    Args:
        words: all labels of the source, each once.
        given: the user's vocabulary; empty: it is made from the words. Words that are all whole numbers are then
            indices, of as many classes as the largest asks for; others are the names, sorted.
        parents: of each name that has any.

    Raises:
        InputError: a word is neither a name nor an index of the vocabulary, or the hierarchy names others or has a
            circle.
    """
    listed = sorted(set(words))
    numbers = all(NUMBER.fullmatch(word) for word in listed)
    if given:
        names = list(given)
    elif listed and numbers:
        largest = max(int(word) for word in listed)
        if largest >= MAX_CLASSES:
            raise InputError(f"label {largest}: must be below {MAX_CLASSES}; is it a class, not a picture's number?")
        names = [str(number) for number in range(largest + 1)]
    else:
        names = sorted({*listed, *parents, *(parent for above in parents.values() for parent in above)})
    place = {name: number for number, name in enumerate(names)}
    for name in (*parents, *(parent for above in parents.values() for parent in above)):
        if name not in place:
            raise unknown("class in the hierarchy", name, place)
    indices = {}
    for word in listed:
        name = word
        if word not in place:
            if not NUMBER.fullmatch(word) or int(word) >= len(names):
                raise unknown("label", word, place)
            name = names[int(word)]
        indices[word] = tuple(sorted(place[above] for above in closure(name, parents)))
    return Labels(tuple(names), indices)


def closure(name: str, parents: Mapping[str, Sequence[str]]) -> set[str]:
    """A class and all its ancestors.

    Raises:
        InputError: the class is its own ancestor.
    """
    found, waiting = {name}, list(parents.get(name, ()))
    while waiting:
        above = waiting.pop()
        if above == name:
            raise InputError(f"hierarchy: {name!r} is its own ancestor; remove one of the lines between")
        if above not in found:
            found.add(above)
            waiting.extend(parents.get(above, ()))
    return found


def kind_of(wanted: str, one_each: bool) -> LabelKind:
    """Single where every picture has exactly one label, unless the user says otherwise.

    Raises:
        InputError: single labels are wanted but not there, or the word is unknown.
    """
    if wanted not in ("auto", "single", "multi"):
        raise unknown("kind of labels", wanted, ("auto", "single", "multi"))
    if wanted == "single" and not one_each:
        raise InputError("--label-kind single: some pictures have no label or several; leave the option out for multi")
    return "multi" if wanted == "multi" or not one_each else "single"


def read_vocabulary(path: str) -> list[str]:
    """The names in a file, one a line; none for an empty path.

    Raises:
        InputError: no such file, or a name twice or empty.
    """
    names = _lines(path, "--vocabulary") if path else []
    for number, name in enumerate(names):
        if not name.strip():
            raise InputError(f"--vocabulary {path}: line {number + 1} is empty; each line must name a class")
    twice = len(names) - len(set(names))
    if twice or (path and not names):
        raise InputError(f"--vocabulary {path}: must name each class once, and one at least; {twice} are repeated")
    return names


def read_hierarchy(path: str) -> dict[str, list[str]]:
    """The parents of each class, from lines of child, tab, parent; none for an empty path.

    Raises:
        InputError: no such file, or a line of another form.
    """
    parents: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path, "--hierarchy") if path else []):
        child, tab, parent = line.partition("\t")
        if not (child and tab and parent) or "\t" in parent:
            raise InputError(f"--hierarchy {path}: line {number + 1}: must be child, one tab, parent; is {line!r}")
        parents.setdefault(child, []).append(parent)
    return parents


def words_of(value: object, where: str) -> tuple[str, ...]:
    """The labels in a cell of a table: a name or index, several with `;` between, or a list (also as JSON text).

    Raises:
        InputError: neither, named by `where`.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: label {value!r}: begins like a JSON list but is none: {error}") from error
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(dict.fromkeys(word.strip() for word in value.split(";") if word.strip()))
    found = value if isinstance(value, list) else [value]
    if not all(type(word) in (str, int) for word in found):
        raise InputError(f"{where}: label {value!r}: must be a name, a whole number, or a list of them")
    return tuple(dict.fromkeys(str(word) for word in found))


def _lines(path: str, option: str) -> list[str]:
    """The lines of a small text file."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: cannot be read as UTF-8 text: {error}") from error
