"""What the drill makes of its words and of the figures it finds; the faults themselves are in tests/faults."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from trainer import cli
from trainer.commands import drill as cli_drill
from trainer.commands.config import resolve_command
from trainer.health.drill import EVERY, GUARD, STEPS, compare, scene_of
from trainer.health.faults import AT, BATCH, CATALOGUE, HARMED, WITHOUT
from trainer.health.sabotage import Harm
from trainer.health.scene import Scene

CALM = {1: (2.0, 1.0), 2: (1.5, 0.5)}


def test_losses_are_compared_to_the_last_bit_where_they_can_be() -> None:
    assert compare(dict(CALM), CALM, exact=True) == ("bitwise", "")
    near = {**CALM, 2: (1.5 * (1 + 1e-6), 0.5)}
    assert compare(near, CALM, exact=False) == ("within 1.0e-06", "")
    assert "differ from the undisturbed run's by 1.0e-06" in compare(near, CALM, exact=True)[1]
    assert "differ" in compare({**CALM, 2: (1.6, 0.5)}, CALM, exact=False)[1]
    assert "made the steps [2] in one run only" in compare({1: (2.0, 1.0)}, CALM, exact=True)[1]


def test_the_last_of_a_repeated_step_counts(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": loss, "train/grad_norm": 1.0} for step, loss in ((1, 3.0), (2, 2.0), (1, 4.0))]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 2, "eval/top1": 0.5}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "train/lo')
    scene = Scene(tmp_path, tmp_path, [])
    assert scene.losses() == {1: (4.0, 1.0), 2: (2.0, 1.0)}
    assert len(scene.rows()) == 3


def test_help_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drill", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and fault.purpose in said for name, fault in CATALOGUE.items())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["kill-rnak"], "did you mean 'kill-rank'"),
        (["all", "--rank", "2"], "did you mean '--ranks'"),
        (["all", "--ranks"], "--ranks: wants a value"),
        (["all", "--ranks", "two"], "--ranks two: must be a number"),
        (["--json"], "names no fault"),
    ],
)
def test_wrong_words_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        cli_drill.drill_command(words)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(InputError, match="is not empty"):
        cli_drill.drill_command(["all", "--out", str(tmp_path)])


def test_the_run_of_a_drill_is_one_that_its_faults_fit(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    scene = scene_of("some", tmp_path, 2, tmp_path / "digits")
    run = resolve_command("demo-digits", scene.words)
    assert (run.data.global_batch, run.optim.steps, run.checkpoint.every) == (BATCH, STEPS, EVERY)
    assert EVERY < AT < HARMED < STEPS
    first = HARMED - 1 - run.guard.rollback_steps
    assert (first, first + run.guard.skip_batches) == WITHOUT
    assert first >= EVERY  # there is a checkpoint to go back to
    assert scene.words[-len(GUARD) :] == GUARD


@pytest.mark.parametrize("name", [name for name, fault in CATALOGUE.items() if fault.harm is not None])
def test_what_is_put_into_a_rank_is_known(name: str) -> None:
    make = CATALOGUE[name].harm
    assert make is not None
    assert Harm.of(json.loads(json.dumps(make(1)))) != Harm()


ROW = {"fault": "sigterm", "problem": "", "detection": 1.25, "recovery": 10.0, "code": 75, "repeated": 3}
FOUND: dict[str, Any] = {
    "device": "cpu",
    "ranks": 2,
    "results": [
        {**ROW, "losses": "bitwise"},
        {**ROW, "fault": "disk-full", "code": None, "losses": "within 2.0e-02", "problem": "the losses differ"},
        {"fault": "bit-flip", "problem": "not found", "detection": None},
    ],
    "costs": {"detection": 1.0, "restart": 9.0, "stall": 0.002, "write": 0.1},
    "ettr": {"drill": 0.25, "7.9 h": 0.991, "1 h": 0.95},
}


def test_the_table() -> None:
    lines = cli_drill.table(FOUND).splitlines()
    assert lines[1].split() == ["sigterm", "yes", "1.2", "s", "10.0", "s", "75", "3", "bitwise"]
    assert lines[2].split()[:2] == ["disk-full", "NO"]
    assert "ran on" in lines[2]
    assert lines[3].split() == ["bit-flip", "NO"]
    assert lines[4:6] == ["disk-full: the losses differ", "bit-flip: not found"]
    assert "99.1% at a failure every 7.9 h, 95.0% at a failure every 1 h" in lines[-1]


@pytest.mark.parametrize(("problem", "code"), [("", 0), ("lost", 1)])
def test_the_exit_code_and_the_folder_say_whether_all_was_survived(
    problem: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def drill(names: list[str], folder: Path, ranks: int, say: Any) -> dict[str, Any]:
        asked.append((names, folder, ranks))
        return {**FOUND, "results": [{**ROW, "losses": "bitwise", "problem": problem}]}

    monkeypatch.setattr("trainer.health.drill.drill", drill)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli_drill.drill_command(["all", "--ranks", "3", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["results"][0]["problem"] == problem
    names, folder, ranks = asked[0]
    assert (names, ranks) == (list(CATALOGUE), 3)
    assert folder.exists() == bool(problem)


def test_the_family_of_a_process_is_found(tmp_path: Path) -> None:
    """The command, its rank, and the rank's own child."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"import os, subprocess, sys; os.environ['RANK'] = '1'; subprocess.run([sys.executable, '-c', {child!r}])"
    scene = Scene(tmp_path / "run", tmp_path, [])
    scene.process = subprocess.Popen([sys.executable, "-c", code])
    try:
        scene.until(lambda: len(scene.family()) == 3, "three processes")
        assert scene.family()[0] == scene.process.pid
        assert scene.ranks() == scene.family()[1:2]
    finally:
        scene.kill()
        assert scene.end() == -9
    assert scene.family() == []
