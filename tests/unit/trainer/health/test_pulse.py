"""What a rank tells the supervisor is what the supervisor reads."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm import beat
from trainer.health import pulse
from trainer.health.goodput import NS, Clock
from trainer.health.pulse import Pulse
from trainer.launch import with_rooms


class Scene:
    """A pulse whose clock goes on as the test says."""

    def __init__(self, folder: Path, first: bool = True) -> None:
        self.now = 0
        self.clock = Clock(1, 0, now=lambda: self.now)
        self.pulse = Pulse(self.clock, folder, first, "n1" if first else "n1~1")
        self.clock.enter("productive")

    def steps(self, *seconds: float) -> None:
        for took in seconds:
            self.now += round(took * NS)
            self.clock.stepped(self.clock.step + 1, 0.0)
            self.pulse.step()


def test_steps_are_told_as_the_supervisor_reads_them(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.steps(30.0)
    scene.pulse.tell()
    assert beat.scan(tmp_path)["n1"] == beat.Beat("n1", 1, 1, "start", 30.0)
    scene.steps(9.0, *[1.0] * 98, 2.0, 1.0)
    scene.pulse.tell()
    assert beat.scan(tmp_path)["n1"] == beat.Beat("n1", 102, 102, "train", 1.0)  # one in a hundred took longer
    file = (tmp_path / "n1.json").stat()
    scene.steps(3.0)
    scene.pulse.tell()
    assert beat.scan(tmp_path)["n1"].longest == 2.0
    after = (tmp_path / "n1.json").stat()
    assert (after.st_ino, after.st_size) == (file.st_ino, file.st_size)


def test_a_run_of_long_steps_is_not_taken_to_hang_in_its_third(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.steps(120.0, 80.0)
    scene.pulse.tell()
    found = beat.scan(tmp_path)["n1"]
    assert (found.phase, found.longest) == ("train", 80.0)
    assert beat.Watch(tmp_path, 900.0, beat.LEAST, 900.0)._limit([found]) == beat.FACTOR * 80.0


def test_waiting_and_what_is_no_step_have_their_names(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.steps(1.0, 1.0)
    seen = []
    for _ in scene.pulse.over(scene.pulse.phase for _ in range(2)):
        seen.append(scene.pulse.phase)
    for kind in ("save", "evaluation", "restart"):
        with scene.clock.of(kind):
            seen.append(scene.pulse.phase)
    assert seen == ["train", "train", "save", "evaluate", "start"]
    assert next(scene.pulse.over(scene.pulse.phase for _ in range(1))) == "data"


def test_another_rank_speaks_only_while_it_waits_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, first=False)
    scene.steps(1.0, 1.0)
    now = time.monotonic()

    def told(waited: float) -> list[str]:
        monkeypatch.setattr("trainer.health.pulse.time.monotonic", lambda: now + waited)
        scene.pulse.tell()
        return [found.phase for found in beat.scan(tmp_path).values()]

    assert told(0.0) == []
    for _ in scene.pulse.over(told(waited) for waited in (0.0, pulse.SPEAKS + 1)):
        assert told(0.0) == []
    monkeypatch.setattr("trainer.health.pulse.time.monotonic", lambda: now)
    assert list(scene.pulse.over(told(waited) for waited in (0.0, pulse.SPEAKS + 1))) == [[], ["data"]]
    assert told(0.0) == []
    assert not list(tmp_path.iterdir())


def test_nobody_listens(tmp_path: Path) -> None:
    quiet = Pulse(Clock(1, 0), None, True, "n1")
    quiet.step()
    quiet.tell()
    assert list(quiet.over([1, 2])) == [1, 2]
    assert quiet.longest == 0.0


def test_stacks_are_written_where_the_launcher_had_asked_for_them_already() -> None:
    """As `slurm.rank` does before the rank's own code begins."""
    code = "import faulthandler, os, signal\nfaulthandler.register(signal.SIGUSR1, all_threads=True)\n"
    code += "from trainer.health import pulse\npulse.listen()\nos.kill(os.getpid(), signal.SIGUSR1)\n"
    done = subprocess.run([sys.executable, "-c", code], env=with_rooms(), capture_output=True, text=True)
    assert done.returncode == 0
    assert "(most recent call first)" in done.stderr
