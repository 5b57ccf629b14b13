"""The commands `config` and `models`, and how overrides on the command line change a recipe. Never imports torch."""

import argparse
import contextlib
import io
import json
import typing
from typing import Any, NoReturn

import tyro

from configs import resolve
from configs.errors import InputError, unknown
from configs.run_json import convert
from configs.schema import Run
from models import spec
from models.cost import table

RESOLUTIONS = (224, 384, 512)
STRIDES = ("expansion", "depthwise")


class Arguments(argparse.ArgumentParser):
    """argparse whose refusals are InputErrors (exit 76), and which takes no abbreviations."""

    def __init__(self, command: str, purpose: str) -> None:
        super().__init__(prog=f"coatnet {command}", description=purpose, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit on."""
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")

    def parse_behind_recipe(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]] | None:
        """The options behind a recipe's name, and the words that set its fields; None: help was asked for and given.

        Raises:
            InputError: words that do not fit, or no recipe in the first place.
        """
        if not argv or "-h" in argv or "--help" in argv:
            self.print_help()
            return None
        if argv[0].startswith("-"):
            self.error("the recipe comes first; `coatnet config list` has them")
        return self.parse_known_args(argv[1:])

    def parse_strict(self, argv: list[str]) -> argparse.Namespace:
        """The parsed words; an unknown option gets a "did you mean".

        Raises:
            InputError: words that do not fit.
        """
        parsed, rest = self.parse_known_args(argv)
        if rest and rest[0].startswith("-"):
            raise unknown(
                "option", rest[0].partition("=")[0], [o for o in self._option_string_actions if o[:2] == "--"]
            )
        if rest:
            self.error(f"unexpected {rest[0]!r}")
        return parsed


def resolve_command(recipe: str, overrides: list[str]) -> Run:
    """The checked Run of a recipe changed by the words of a command line, e.g. `["--optim.lr", "8e-4"]`.

    Raises:
        InputError: unknown recipe, field or model, or a value of the wrong type or out of range.
        SystemExit: code 0, after `--help` has printed every setting with the recipe's values.
    """
    run = resolve.load(recipe)
    _check_words(run, overrides)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changed = tyro.cli(Run, default=run, args=overrides, prog=f"coatnet train {recipe}")
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise InputError(_refusal(end, said.getvalue())) from None
    resolve.check(changed)
    spec.of(changed.model)  # a name that is no model is refused here, long before the network is built
    return changed


def config_command(argv: list[str]) -> int:
    """`coatnet config list | show RECIPE [overrides] | diff A B`, each with --json. Returns the exit code."""
    actions = {"list": _list, "show": _show, "diff": _diff}
    if not argv or argv[0] in ("-h", "--help"):
        print("coatnet config list [--json]\ncoatnet config show RECIPE [--FIELD VALUE ...] [--json]")
        print("coatnet config diff A B [--json]   A, B: recipes, functions ./mine.py:recipe, or run.json files")
        return 0
    if argv[0] not in actions:
        raise unknown("action of `coatnet config`", argv[0], actions)
    actions[argv[0]](argv[1:])
    return 0


def models_command(argv: list[str]) -> int:
    """`coatnet models`: parameters and multiply-adds of every model beside the paper's. Returns the exit code."""
    parser = Arguments("models", "Parameters and multiply-adds of every model beside the paper's.")
    parser.add_argument("--resolution", type=int, default=224, help="pixels: 224, 384 or 512")
    parser.add_argument(
        "--stride", help="which MBConv convolution halves: expansion or depthwise; else each model's own"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list of rows")
    options = parser.parse_strict(argv)
    if options.resolution not in RESOLUTIONS:
        nearest = min(RESOLUTIONS, key=lambda size: abs(size - options.resolution))
        raise InputError(f"--resolution = {options.resolution}: must be 224, 384 or 512; nearest valid: {nearest}")
    if options.stride not in (None, *STRIDES):
        raise unknown("stride", options.stride, STRIDES)
    rows = table(options.resolution, options.stride)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"at {options.resolution} px; paper: arXiv 2106.04803 (a dash: it prints no figure)")
    print(
        f"{'model':<18}{'stride':<10}{'parameters':>14}{'paper':>10}{'dev.':>8}{'multiply-adds':>20}{'paper':>10}{'dev.':>8}"
    )
    for row in rows:
        name = f"{row['name']:<18}{row['stride']:<10}"
        print(name + _compared(row, "parameters", 14, 1e6, "M") + _compared(row, "multiply_adds", 20, 1e9, "G"))
    return 0


def _compared(row: dict[str, Any], key: str, width: int, unit: float, letter: str) -> str:
    """Ours, the paper's figure and the deviation in percent; dashes where nothing is published."""
    ours, paper = row[key], row[f"published_{key}"]
    if paper is None:
        return f"{ours:>{width},}{'-':>10}{'-':>8}"
    return f"{ours:>{width},}{f'{paper / unit:,.1f}{letter}':>10}{f'{100 * (ours / paper - 1):+.1f}%':>8}"


def _list(argv: list[str]) -> None:
    """Print the built-in recipes."""
    parser = Arguments("config list", "The built-in recipes.")
    parser.add_argument("--json", action="store_true", help="a JSON list of name and summary")
    options = parser.parse_strict(argv)
    recipes = [{"name": name, "summary": resolve.summary(name)} for name in resolve.names()]
    if options.json:
        print(json.dumps(recipes, indent=2))
        return
    width = max(len(recipe["name"]) for recipe in recipes) + 2
    for recipe in recipes:
        print(f"{recipe['name']:<{width}}{recipe['summary']}")


def _show(argv: list[str]) -> None:
    """Print a resolved run: as JSON exactly what `configs.resolve.from_json` reads."""
    words = [word for word in argv if word != "--json"]
    if not words or words[0].startswith("-"):
        raise InputError("coatnet config show: needs a recipe; `coatnet config list` names them")
    run = resolve_command(words[0], words[1:])
    if len(words) < len(argv):
        print(resolve.to_json(run), end="")
        return
    print(f"# {run.recipe}, hash {resolve.digest(run)}")
    for field, value in resolve.flat(run).items():
        print(f"{field:<32}{_plain(value)}")


def _diff(argv: list[str]) -> None:
    """Print the settings in which two runs differ."""
    parser = Arguments("config diff", "The settings in which two runs differ.")
    parser.add_argument("a", help="recipe, ./mine.py:recipe, or run.json")
    parser.add_argument("b", help="recipe, ./mine.py:recipe, or run.json")
    parser.add_argument("--json", action="store_true", help="a JSON list of field, a, b")
    options = parser.parse_strict(argv)
    changes = resolve.diff(resolve.load(options.a), resolve.load(options.b))
    if options.json:
        print(json.dumps([{"field": field, "a": a, "b": b} for field, a, b in changes], indent=2))
        return
    for field, a, b in changes:
        print(f"{field:<32}{_plain(a)} -> {_plain(b)}")


def _plain(value: object) -> str:
    """A setting as one would type it after its flag."""
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    return repr(value) if value == "" else str(value)


def _kinds(section: type, prefix: str = "") -> dict[str, Any]:
    """The declared type of every setting by its dotted name."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(section).items():
        nested = typing.get_type_hints(kind) if isinstance(kind, type) else {}
        kinds |= _kinds(kind, f"{prefix}{name}.") if nested else {prefix + name: kind}
    return kinds


def _check_words(run: Run, overrides: list[str]) -> None:
    """Refuse fields that do not exist and values outside a choice, in our words, before tyro parses the rest.

    Raises:
        InputError: naming the field, with the closest known ones or the nearest valid value.
    """
    kinds = _kinds(Run)
    for position, word in enumerate(overrides):
        if not word.startswith("--") or word == "--help":
            continue
        written, equals, value = word[2:].partition("=")
        name = written.replace("-", "_")
        section, _, leaf = name.rpartition(".")
        positive = f"{section}.{leaf.removeprefix('no_')}"
        if name == "recipe":
            raise InputError(f"--recipe: the recipe is the word after the command, here {run.recipe!r}")
        if name not in kinds and kinds.get(positive) is not bool:
            raise unknown("field", name, kinds)
        given = value if equals else next(iter(overrides[position + 1 : position + 2]), None)
        if given is not None and name in kinds:
            _check_value(name, given, kinds[name])


def _check_value(name: str, given: str, kind: Any) -> None:
    """Refuse a word that is not one of a setting's choices, or not the number it should be."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if choices and given not in map(str, choices):
        number = isinstance(choices[0], int) and given.lstrip("+-").isdecimal()
        convert(name, int(given) if number else given, kind)
    if kind in (int, float):
        try:
            kind(given)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise InputError(f"{name} = {given!r}: must be {wanted}") from None


def _refusal(end: BaseException, said: str) -> str:
    """Why tyro refused the words: our own InputError if one lies behind it, else its message without the frame."""
    cause = end.__context__
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__context__
    lines = [line.strip(" \u2502") for line in said.splitlines() if line.startswith("\u2502")]
    rule = next((index for index, line in enumerate(lines) if line.startswith("\u2500")), len(lines))
    return " ".join(lines[:rule]).strip() or said.strip()
