"""What a user installs: the wheel holds the five rooms whole, the command, the licence, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOMS = ("configs", "models", "data_pipeline", "trainer", "slurm")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree, so that neither a stale build folder nor this test's own gets into the other."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in (*ROOMS, "tests"):
        shutil.copytree(repository / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / file, copy)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "out", "."]
    done = subprocess.run([sys.executable, "-m", "pip", *words], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_of_the_five_rooms_and_no_other(repository: Path, wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tree = {str(path.relative_to(repository)) for room in ROOMS for path in (repository / room).rglob("*.py")}
    assert packed == tree


def test_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    metadata = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "coatnet = trainer.cli:main" in wheel.read(metadata["entry_points.txt"]).decode().splitlines()
    assert b"Apache License" in wheel.read(metadata["licenses/LICENSE"])
    header = HeaderParser().parsestr(wheel.read(metadata["METADATA"]).decode())
    assert header["License-Expression"] == "Apache-2.0"
    assert header["Requires-Python"] == ">=3.11"
    assert set(header.get_all("Provides-Extra") or []) == {
        "demo", "timm", "ffcv", "fairscale", "slurm", "tensorboard", "wandb", "dev", "s3", "gs",
    }  # fmt: skip


def test_wheel_pins_what_we_touch_inside(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    needed = HeaderParser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    base = [line for line in needed if "extra ==" not in line]
    assert "torch>=2.11" in base
    assert [line for line in base if line.startswith("deepspeed")] == ["deepspeed<0.20,>=0.19.8"]


def test_contributing_says_why_each_dependency_is_there(repository: Path, wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    needed = HeaderParser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    reasons = (repository / "CONTRIBUTING.md").read_text()
    packages = {line.split(";")[0].split("[")[0].rstrip("0123456789.<>=!~, ") for line in needed}
    assert len(packages) > 10
    assert not [package for package in packages if f"`{package}`" not in reasons]
