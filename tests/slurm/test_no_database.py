"""A cluster without accounting: sacct says nothing, and the commands tell the truth all the same."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import scheduler
from tests.slurm.lab import SCRIPTS, Lab
from tests.slurm.test_scheduler import PROFILE, Light

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def bare(lab: Lab) -> Iterator[Lab]:
    """A second cluster beside the first: other ports, the same names."""
    folder = lab.folder.with_name(lab.folder.name + "-bare")
    own = {"LAB": str(folder), "LAB_DATABASE": "0", "LAB_PORT": "26817", "LAB_KEEP_HOSTS": "1"}
    subprocess.run([str(SCRIPTS / "up.sh")], env={**os.environ, **own}, check=True, timeout=120)
    try:
        yield Lab(folder)
    finally:
        subprocess.run([str(SCRIPTS / "down.sh"), "--purge"], env={**os.environ, **own}, check=True, timeout=120)


@pytest.fixture
def light(bare: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Light:
    """A light run on it."""
    for name in ("SLURM_CONF", "LAB"):
        monkeypatch.setenv(name, bare.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    return Light(bare, tmp_path)


def test_a_job_s_life_is_told_without_accounting(light: Light) -> None:
    sacct = subprocess.run(["sacct"], env=light.lab.environment, capture_output=True, text=True)
    assert sacct.returncode != 0
    assert "accounting storage is disabled" in sacct.stderr
    light.steps = 40
    light.submit()
    [job], folder = light.jobs, light.folders[0]
    light.until(3)
    assert scheduler.states(job) == {job: "RUNNING None"}
    assert scheduler.live(folder) == [job]
    light.lab.ask("scancel", "--batch", "--signal=USR2", job)
    light.ends("PENDING", hurry=False)
    assert scheduler.live(folder) == [job]
    light.ends("COMPLETED")
    assert scheduler.states(job) == {job: "COMPLETED"}
    assert scheduler.live(folder) == []
    assert scheduler.states("4711") == {}  # one that nobody remembers


def test_a_cancelled_job_is_known_to_be_over(light: Light) -> None:
    light.steps = 1000
    light.submit(replace(PROFILE, requeue=False)).until(2)
    light.lab.ask("scancel", light.jobs[0])
    light.ends("CANCELLED")
    assert scheduler.live(light.folders[0]) == []
