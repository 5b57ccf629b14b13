"""Packages that a run may ask for and that the plain installation leaves out. No torch."""

import importlib.util
from pathlib import Path

from configs.errors import InputError
from configs.schema import Run


def require_fairscale(setting: str) -> Path:
    """The folder of fairscale's code, for a setting that needs it; nothing is imported.

    Args:
        setting: the field of `parallel` that asks for it.

    Raises:
        InputError: naming the field, how to install the package, and what does without.
    """
    found = importlib.util.find_spec("fairscale")
    if found is None or found.origin is None:
        raise InputError(
            f"parallel.{setting} = 'fairscale': the package is missing; pip install -e '.[fairscale]'; nearest valid: "
            f"'own'"
        )
    return Path(found.origin).parent


def check_fairscale(run: Run) -> None:
    """Refuse a run that asks for fairscale where there is none.

    Raises:
        InputError: see `require_fairscale`.
    """
    for setting in ("partition_impl", "recompute_impl"):
        if getattr(run.parallel, setting) == "fairscale":
            require_fairscale(setting)
