"""Saves that are killed, damaged, cut off from power or from room: nothing bad is restored, and every run can go on."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from configs.schema import Checkpoint
from tests.faults import disks
from tests.faults.checkpoint_campaign import Ranks, Trial, chain, damage, let_end
from tests.faults.disk_campaign import full_chain, power_chain
from tests.faults.save_rank import Life
from trainer.launch import free_port
from trainer.state import checkpoint, retention
from trainer.state.listing import verified

pytestmark = pytest.mark.timeout(600)
KILLS = int(os.environ.get("COATNET_KILLS", "210"))  # of the slow campaign, in chains of 15
needs_disks = pytest.mark.skipif(bool(disks.impossible()), reason=f"NOT RUN: {disks.impossible()}")


def bad(trials: list[Trial]) -> list[str]:
    return [f"seed {trial.seed}, {trial.mode}: {text}" for trial in trials for text in trial.bad]


def test_killed_saves_leave_what_was_saved(tmp_path: Path) -> None:
    trials = chain(tmp_path / "a", seed=3, kills=6, damages=0.4)
    assert bad(trials) == []
    assert sum(trial.saves for trial in trials) > 3
    assert any(trial.passed for trial in trials)  # what was damaged was seen


@needs_disks
def test_what_was_said_to_be_saved_outlives_a_power_cut(tmp_path: Path) -> None:
    assert bad(power_chain(tmp_path / "forced", seed=1, cuts=3)) == []


@needs_disks
def test_without_fsync_it_does_not(tmp_path: Path) -> None:
    """The test above can fail."""
    assert "was said to be saved" in " ".join(bad(power_chain(tmp_path / "left", seed=1, cuts=2, forced=False)))


@needs_disks
def test_a_full_disk_costs_no_checkpoint_and_holds_no_rest(tmp_path: Path) -> None:
    trials = full_chain(tmp_path / "full", seed=2)
    assert bad(trials) == []
    assert trials[0].failed >= 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three ranks, and scores beside them."""
    root = tmp_path_factory.mktemp("saved")
    trial = Trial(0, "ends", 3, True, 0)
    let_end(Ranks(Life(root, 3, free_port(), Checkpoint(), 2, again=False)), trial)
    assert bad([trial]) == []
    retention.write_score(root, trial.known, {"eval/top1": 0.5})
    return root


@pytest.mark.parametrize("rounds", [3, pytest.param(35, marks=pytest.mark.slow)])
def test_damage_in_every_kind_of_file_is_named(rounds: int, saved: Path, tmp_path: Path) -> None:
    newest = retention.found(saved)[0]
    draw, told = random.Random(rounds), 0
    names = sorted(path.name for path in newest.iterdir())
    for name in [name for name in names for _ in range(rounds)]:
        copy = tmp_path / newest.name
        shutil.copytree(newest, copy)
        what = damage(copy / name, draw)
        assert checkpoint.damage(copy), (name, what)
        words = " ".join(verified(copy)["damage"])
        assert name in words or (name == "COMPLETE" and "manifest.json" in words), (name, what, words)
        told += 1
        shutil.rmtree(copy)
    assert told == rounds * len(names)


def test_damaged_scores_are_not_believed(saved: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    for number in range(40):
        shutil.copy(saved / retention.SCORES, tmp_path / retention.SCORES)
        if damage(tmp_path / retention.SCORES, draw) in ("gone", "tail"):
            continue
        found = retention.read_scores(tmp_path)
        text = (tmp_path / retention.SCORES).read_text(errors="replace")
        same = found and json.loads(text)["scores"] == json.loads((saved / retention.SCORES).read_text())["scores"]
        assert not found or same, number  # a flip in white space changes nothing


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_killed_saves(tmp_path: Path) -> None:
    for seed in range(KILLS // 15):
        assert bad(chain(tmp_path / str(seed), seed, kills=15, damages=0.25)) == []
        shutil.rmtree(tmp_path / str(seed))


@pytest.mark.slow
@needs_disks
@pytest.mark.timeout(7200)
def test_forty_power_cuts(tmp_path: Path) -> None:
    for seed in range(4):
        assert bad(power_chain(tmp_path / str(seed), seed, cuts=10)) == []
