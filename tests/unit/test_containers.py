"""The lock file and the recipes of containers, as far as they can be checked where no engine is: against the tree."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainer.machine import lock


@pytest.fixture(scope="module")
def locked(repository: Path) -> dict[str, str]:
    lines = (repository / "requirements.lock").read_text(encoding="ascii").splitlines()
    pairs = [line.partition("==")[::2] for line in lines if not line.startswith("#")]
    return dict(pairs)


def test_every_requirement_is_locked_to_a_version_that_fits(locked: dict[str, str]) -> None:
    for requirement in map(Requirement, lock.own(lock.EXTRAS)):
        version = locked.get(canonicalize_name(requirement.name), "")
        assert requirement.specifier.contains(version, prereleases=True), (str(requirement), version)


def test_the_lock_holds_exact_versions_and_no_place(repository: Path, locked: dict[str, str]) -> None:
    assert len(locked) > 100
    assert all(re.fullmatch(r"[0-9][0-9a-zA-Z.+!]*", version) for version in locked.values())
    text = (repository / "requirements.lock").read_text()
    assert not re.search(r"://|--index|--find-links|--extra-index", text)
    assert list(locked) == sorted(locked)
    assert lock.PROJECT not in locked


def test_what_is_installed_is_followed_to_its_end() -> None:
    found = lock.locked(["slurm"])
    assert found["submitit"]
    assert found["cloudpickle"]  # submitit's own
    assert found["numpy"]
    assert "pytest" not in found
    assert "pytest" in lock.locked(["dev"])
    assert lock.text({"a": "1.0"}, ["x"]).endswith("\na==1.0\n")


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_a_container_copies_what_there_is_and_every_room(name: str, repository: Path) -> None:
    text = (repository / name).read_text(encoding="ascii")
    pattern = r"^COPY (.+) \S+$" if name == "Dockerfile" else r"^    (\S+) /opt/coatnet/\S+$"
    copied = [word for line in re.findall(pattern, text, re.MULTILINE) for word in line.split()]
    assert {"configs", "models", "data_pipeline", "trainer", "slurm", "requirements.lock", "pyproject.toml"} <= {
        *copied
    }
    assert all((repository / word).exists() for word in copied)
    assert "--no-deps -r /opt/coatnet/requirements.lock" in text  # the lock is whole: nothing else is taken


def test_the_builder_gets_what_the_dockerfile_copies(repository: Path) -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (repository / "Dockerfile").read_text(), re.MULTILINE)
    let_in = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {word for line in copied for word in line.split()} == let_in


def test_an_apptainer_definition_has_its_sections(repository: Path) -> None:
    text = (repository / "apptainer.def").read_text()
    assert re.findall(r"^%(\w+)$", text, re.MULTILINE) == ["files", "post", "test", "runscript"]
    assert re.search(r"^Bootstrap: docker\nFrom: (\S+)$", text, re.MULTILINE)
    image = re.search(r"^FROM (\S+)$", (repository / "Dockerfile").read_text(), re.MULTILINE)
    assert image is not None
    assert f"From: {image[1]}" in text
