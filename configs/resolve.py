"""From a recipe's name to one validated Run, and the rules that span several of its settings.

Rules on one setting are in `configs/schema.py`; rules on the world size in `trainer/plan.py`.
"""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType

from configs import demo, imagenet, jft, study
from configs.errors import InputError, unknown
from configs.parallel_rules import check_parallel
from configs.resume_rules import check_allowed
from configs.run_json import check_types, diff, digest, flat, from_json, recorded, to_json
from configs.schema import Run
from configs.tars import check_tars

__all__ = [
    "RECIPES", "check", "diff", "digest", "flat", "from_json", "load", "names", "recorded", "summary", "to_json",
    "total_steps", "warmup",
]  # fmt: skip

RECIPES: dict[str, Callable[[], Run]] = {
    "demo-digits": demo.digits,
    "demo-clipart": demo.clipart,
    "coatnet0-in1k-224": imagenet.coatnet0_in1k_224,
    "coatnet4-in21k-224": imagenet.coatnet4_in21k_224,
    "coatnet5-jft300m-224": jft.coatnet5_jft300m_224,
    "coatnet7-jft3b-224": jft.coatnet7_jft3b_224,
    **study.RECIPES,
}


def names() -> list[str]:
    """The built-in recipes' names."""
    return list(RECIPES)


def summary(name: str) -> str:
    """The first line of a built-in recipe's docstring."""
    return (inspect.getdoc(RECIPES[name]) or "").partition("\n")[0]


def load(name: str) -> Run:
    """The checked Run of a built-in recipe, of a function in a file (`./mine.py:recipe`), or of a `run.json`.

    A file is imported by its path, so it is code that the user trusts. A Run it returns without a recipe name gets
    the function's.

    Raises:
        InputError: no such recipe, file or function, a function that gives no Run, or a Run that breaks a rule.
    """
    path, colon, function = name.rpartition(":")
    if name in RECIPES:
        run = RECIPES[name]()
    elif colon and path.endswith(".py"):
        run = _call(_import(path), path, function)
    elif name.endswith(".py"):
        module = _import(name)
        example = next(iter(_functions(module)), "recipe")
        raise InputError(f"recipe {name!r}: name the function in the file too: {name}:{example}")
    elif name.endswith(".json"):
        run = _from_file(name)
    else:
        raise unknown("recipe", name, RECIPES)
    check(run)
    return run


def check(run: Run) -> None:
    """Hold the types of all settings, and the rules between settings that need neither data nor world size.

    Raises:
        InputError: naming the field, its value, the rule and the nearest valid value.
    """
    check_types(run)
    check_tars(run.data)
    check_allowed(run.resume.allow, flat(run))
    if run.checkpoint.keep_best and not run.evaluate.every:
        raise InputError(
            f"checkpoint.keep_best = {run.checkpoint.keep_best!r}: nothing is scored before the end (evaluate.every = "
            f"0); nearest valid: ''"
        )
    optim = run.optim
    if optim.warmup_epochs == 0 and 0 < optim.steps < optim.warmup_steps:
        raise InputError(
            f"optim.warmup_steps = {optim.warmup_steps}: must be at most optim.steps = {optim.steps}; nearest valid: "
            f"{optim.steps}"
        )
    if optim.steps == 0 and optim.warmup_epochs > optim.epochs:
        raise InputError(
            f"optim.warmup_epochs = {optim.warmup_epochs}: must be at most optim.epochs = {optim.epochs}; nearest "
            f"valid: {optim.epochs}"
        )
    if run.parallel.micro_batch > run.data.global_batch:
        raise InputError(
            f"parallel.micro_batch = {run.parallel.micro_batch}: must be at most data.global_batch = "
            f"{run.data.global_batch}; nearest valid: {run.data.global_batch}"
        )
    check_parallel(run)
    if run.model.drop_path_group and run.model.drop_path * run.model.drop_path_group <= 0.5:
        raise InputError(
            f"model.drop_path_group = {run.model.drop_path_group}: at model.drop_path = {run.model.drop_path} no "
            f"sample of so small a group would ever drop; nearest valid: 0"
        )
    if run.model.drop_path_group and run.data.global_batch % run.model.drop_path_group:
        nearest = math.gcd(run.model.drop_path_group, run.data.global_batch)
        raise InputError(
            f"model.drop_path_group = {run.model.drop_path_group}: must divide data.global_batch = "
            f"{run.data.global_batch}; nearest valid: {nearest}"
        )
    folder = run.name or run.recipe
    if folder.startswith((".", "-")) or not folder.isprintable():
        raise InputError(f"name = {folder!r}: must be a folder name that starts with neither '.' nor '-'")


def total_steps(run: Run, samples: int) -> int:
    """Optimizer steps of the whole run over a training split of `samples`: at least 1.

    `optim.steps` when given; else the whole global batches in `optim.epochs` passes, rounded down.
    """
    return run.optim.steps or max(1, _epochs_in_steps(run, run.optim.epochs, samples))


def warmup(run: Run, samples: int) -> int:
    """Optimizer steps of the warm-up over a training split of `samples`; `optim.warmup_epochs` wins when positive.

    On made-up pictures it may be longer than the run: how many there are says nothing about the recipe's own data.

    Raises:
        InputError: the warm-up is longer than the run, so the peak learning rate would never be reached.
    """
    by_epochs = run.optim.warmup_epochs > 0
    steps = _epochs_in_steps(run, run.optim.warmup_epochs, samples) if by_epochs else run.optim.warmup_steps
    total = total_steps(run, samples)
    if steps > total and not run.data.synthetic:
        field, value = ("warmup_epochs", run.optim.warmup_epochs) if by_epochs else ("warmup_steps", steps)
        raise InputError(
            f"optim.{field} = {value}: a warm-up of {steps} steps is longer than the run, {total} steps over {samples} "
            f"samples in batches of {run.data.global_batch}; nearest valid: optim.warmup_steps {total}"
        )
    return steps


def _epochs_in_steps(run: Run, epochs: float, samples: int) -> int:
    """Whole global batches in `epochs` passes. Exact: 0.29 means 29/100, which in floats would lose a step."""
    return int(Fraction(str(epochs)) * samples / run.data.global_batch)


def _from_file(name: str) -> Run:
    """The Run in a JSON file that the user names: every field must be there."""
    try:
        return from_json(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"run file {name!r}: cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"run file {name!r}: {error}") from None


def _import(name: str) -> ModuleType:
    """The module in a recipe file, imported by its path."""
    path = Path(name)
    if not path.is_file():
        nearby = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise unknown("recipe file", name, nearby) if nearby else InputError(f"recipe file {name!r}: does not exist")
    title = f"coatnet_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None, "a .py file always has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # dataclasses defined in the file look their module up
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"recipe file {name!r}: importing it failed: {type(error).__name__}: {error}") from error
    return module


def _functions(module: ModuleType) -> dict[str, Callable[[], object]]:
    """The public functions that a recipe file defines itself."""
    found = inspect.getmembers(module, inspect.isfunction)
    return {name: item for name, item in found if item.__module__ == module.__name__ and not name.startswith("_")}


def _call(module: ModuleType, path: str, name: str) -> Run:
    """The Run that function `name` of a recipe file returns."""
    functions = _functions(module)
    if name not in functions:
        if not functions:
            raise InputError(f"recipe file {path!r}: defines no function; write `def {name or 'recipe'}() -> Run`")
        raise unknown(f"function in {path!r}:", name, functions)
    required = [
        parameter.name
        for parameter in inspect.signature(functions[name]).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise InputError(f"recipe {path}:{name}: must take no arguments; it requires {', '.join(required)}")
    try:
        run = functions[name]()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"recipe {path}:{name}: {_last_line(error, path)}") from error
    if not isinstance(run, Run):
        raise InputError(f"recipe {path}:{name}: must return a configs.schema.Run, not {type(run).__name__}")
    return run if run.recipe else replace(run, recipe=name)


def _last_line(error: Exception, path: str) -> str:
    """What a recipe raised, and the last line of its own file on the way there."""
    what = " ".join(traceback.format_exception_only(error)[-1].split())
    file = Path(path).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
    return f"raised {what} (line {lines[-1]})" if lines else f"raised {what}"
