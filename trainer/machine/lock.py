"""The exact versions of a tested environment, as constraints for pip: `python -m trainer.machine.lock [EXTRA ...]`.

What is installed is followed from this project's own requirements through theirs; nothing is asked of a registry. The
file names no place to get packages from, so it serves a mirror, a folder of wheels and a container alike.
"""

import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("demo", "dev", "slurm")
PROJECT = "coatnet"
ROOT = Path(__file__).resolve().parents[2]


def own(extras: Sequence[str]) -> list[str]:
    """What pyproject.toml requires, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(text for name in extras for text in project["optional-dependencies"][name])]


def locked(extras: Sequence[str]) -> dict[str, str]:
    """Name to version of all that the project with these extras needs here, itself left out.

    Raises:
        importlib.metadata.PackageNotFoundError: the environment is not complete.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    texts = [(text, frozenset[str]()) for text in own(extras)]
    while texts:
        text, asked = texts.pop()
        requirement = Requirement(text)
        marker, needed = requirement.marker, (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if needed in seen or (marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *asked))):
            continue
        seen.add(needed)
        package = importlib.metadata.distribution(needed[0])
        found[needed[0]] = package.version
        texts += [(more, needed[1]) for more in package.requires or []]
    return dict(sorted(found.items()))


def text(versions: dict[str, str], extras: Sequence[str]) -> str:
    """The file's content."""
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    head = [
        f"# By `make lock` on {where}: the versions that the tests ran with, of all that",
        f"# {PROJECT}[{','.join(extras)}] needs. `pip install -e . -c requirements.lock` takes these versions,",
        "# `make wheels` collects them for machines without a network.",
    ]
    return "\n".join([*head, *(f"{name}=={version}" for name, version in versions.items())]) + "\n"


def main(extras: Sequence[str]) -> None:
    """Print the file."""
    wanted = extras or EXTRAS
    sys.stdout.write(text(locked(wanted), wanted))


if __name__ == "__main__":
    main(sys.argv[1:])
