"""A Run as JSON and as flat dotted fields: exact in both directions, strict when reading, and hashed."""

import dataclasses
import difflib
import hashlib
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from configs.errors import InputError, unknown
from configs.schema import Run

# What `digest` leaves out: labels, places and processes. Everything else counts, because it changes the samples, the
# arithmetic or the layout, or (checkpoint, evaluate) when the run's state is taken and judged.
NOT_HASHED = (
    "recipe", "name", "runs", "tracking", "cluster", "resume",
    "data.cache", "data.cache_bytes", "data.fetch_retries", "data.pipe", "data.damage_budget", "parallel.offload_path",
)  # fmt: skip


def flat(run: Run) -> dict[str, Any]:
    """Every setting by its dotted name, in the order of the schema: `{"optim.lr": 0.001, ...}`.

    Values have the type the schema declares: a whole number given for a float comes out as a float, so that equal
    runs print and hash alike.

    Raises:
        InputError: a value is not of its field's type.
    """
    return dict(_leaves(run, ""))


def check_types(run: Run) -> None:
    """Refuse a Run some field of which holds a value the schema does not allow.

    Raises:
        InputError: naming the field, its value, the type, and the nearest valid value of a choice.
    """
    flat(run)


def diff(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """The settings that differ: (dotted field, value in `a`, value in `b`), in the order of the schema."""
    left, right = flat(a), flat(b)
    return [(field, left[field], right[field]) for field in left if left[field] != right[field]]


def digest(run: Run) -> str:
    """A hash of what the run trains: 12 hex digits of sha256 over its canonical JSON, without NOT_HASHED."""
    content = {field: value for field, value in flat(run).items() if not {field, field.split(".")[0]} & set(NOT_HASHED)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_json(run: Run) -> str:
    """The whole Run as indented JSON, one object per section; `from_json` gives it back exactly."""
    document: dict[str, Any] = {}
    for field, value in flat(run).items():
        section, _, leaf = field.rpartition(".")
        (document.setdefault(section, {}) if section else document)[leaf] = value
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Run:
    """The Run that `to_json` wrote.

    Raises:
        InputError: not JSON, a key that is unknown, missing or given twice, or a value of the wrong type or range.
    """
    run = _build(Run, _document(text), "", None)
    assert isinstance(run, Run)
    return run


def recorded(path: Path) -> Run:
    """The Run of a run folder's `run.json`, which an older release may have written; see `record`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}; restore the file or take another run folder") from error
    return record(text, path)


def record(text: str, where: Path) -> Run:
    """The Run in the JSON of a run folder or of a checkpoint, which an older release may have written.

    A field that the release did not know has its default, and one line on stderr says so.

    Raises:
        InputError: naming the file: it is no run's record, or `from_json` would refuse what is there.
    """
    absent: list[str] = []
    try:
        document = _document(text)
        if isinstance(document, dict) and "recipe" not in document:
            raise InputError("is not a run's record: it names no recipe")
        run = _build(Run, document, "", absent)
    except InputError as error:
        raise InputError(f"{where}: {error}; restore the file or take another run folder") from None
    assert isinstance(run, Run)
    if absent:
        sys.stderr.write(f"{where}: written by an older release; at their defaults: {', '.join(absent)}\n")
    return run


def flattened(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A JSON object by dotted names, whatever release wrote it."""
    rows: dict[str, Any] = {}
    for key, value in document.items():
        rows |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def _document(text: str) -> object:
    """What a JSON text holds, read strictly."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or nested too deeply
        raise InputError(
            f"a run's JSON cannot be read: {error}; it is written by `coatnet config show --json`"
        ) from None


def convert(field: str, value: object, kind: Any) -> Any:
    """`value` as the type `kind` of the schema: str, int, float, bool, Literal, or a tuple, of fixed length or not.

    JSON has no tuples, so a list will do for one; a whole number will do for a float. Nothing else is converted.

    Raises:
        InputError: naming `field`, the value and what is wanted.
    """
    if typing.get_origin(kind) is Literal:
        return _choice(field, value, typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1:] == (Ellipsis,) and isinstance(value, list | tuple):
            kinds = kinds[:1] * len(value)
        if kinds[-1:] == (Ellipsis,):
            raise InputError(f"{field} = {value!r}: must be a list of values")
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise InputError(f"{field} = {value!r}: must be {len(kinds)} values")
        return tuple(convert(f"{field}[{index}]", *pair) for index, pair in enumerate(zip(value, kinds, strict=True)))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # NaN, infinities, and integers beyond any float
            raise InputError(f"{field} = {value!r}: must be a finite number")
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise InputError(f"{field} = {value!r}: must be of type {kind.__name__}, not {type(value).__name__}")


def _choice(field: str, value: object, choices: tuple[Any, ...]) -> Any:
    """`value` if it is one of the choices of a Literal (1 is not True, nor 1.0)."""
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    if isinstance(value, int | float) and all(isinstance(choice, int) for choice in choices):
        near = min(choices, key=lambda choice: abs(choice - value))
    else:
        near = max(choices, key=lambda choice: difflib.SequenceMatcher(None, str(value), str(choice)).ratio())
    listed = ", ".join(repr(choice) for choice in choices)
    raise InputError(f"{field} = {value!r}: must be one of {listed}; nearest valid: {near!r}")


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, checked value) of every setting below a dataclass instance."""
    kinds = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        name, value, kind = prefix + item.name, getattr(section, item.name), kinds[item.name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, typing.cast(type, kind)):
                raise InputError(f"{name} = {value!r}: must be a configs.schema.{typing.cast(type, kind).__name__}")
            yield from _leaves(value, name + ".")
        else:
            yield name, convert(name, value, kind)


def _build(kind: type, document: object, prefix: str, absent: list[str] | None) -> object:
    """A dataclass instance from its JSON object, which must have every field and no other.

    Args:
        absent: takes the names of fields that are not there and keep their defaults; None refuses them.
    """
    if not isinstance(document, dict):
        raise InputError(f"{prefix.rstrip('.') or 'a run'} = {document!r}: must be a JSON object")
    kinds = typing.get_type_hints(kind)
    for key in document:
        if key not in kinds:
            raise unknown("field", prefix + key, [prefix + name for name in kinds])
    values = {}
    for name, inner in kinds.items():
        if name not in document and absent is not None:
            absent.append(prefix + name)
            continue
        if name not in document:
            raise InputError(
                f"{prefix}{name}: missing; every field must be given, as `coatnet config show --json` does"
            )
        value = document[name]
        nested = dataclasses.is_dataclass(inner)
        if nested:
            values[name] = _build(inner, value, f"{prefix}{name}.", absent)
        else:
            values[name] = convert(prefix + name, value, inner)
    return kind(**values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refusing a key given twice (Python's reader would silently take the last)."""
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{next(name for name in names if names.count(name) > 1)}: given twice in one JSON object")
    return document


def _no_constant(text: str) -> float:
    """Refuse NaN and infinities, which are not JSON and no setting takes."""
    raise InputError(f"{text} in a run's JSON: must be a finite number")
