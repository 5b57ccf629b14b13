"""A training one of whose ranks is killed again and again ends, to the bit, as an undisturbed one.

The campaign of 50 kills is `python tests/benchmarks/kills.py`; this is the same with a few.
"""

import time
from pathlib import Path

import pytest

from data_pipeline.building import demo
from tests.benchmarks import kills
from trainer.health import drill
from trainer.health.faults import CATALOGUE, WITHOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS, KILLS = 80, 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs lie."""
    return tmp_path_factory.mktemp("kills")


def test_a_training_that_is_killed_again_and_again_is_an_undisturbed_one(work: Path) -> None:
    calm = kills.undisturbed(work, STEPS)
    plan = kills.planned(KILLS, STEPS, seed=7)
    scene, campaign = kills.killed(work, STEPS, plan, at_most=1)  # broken off
    assert len(campaign.kills) == 1
    assert not (scene.folder / "done").exists()
    scene, campaign = kills.killed(work, STEPS, plan, at_most=KILLS)
    assert len(campaign.kills) == KILLS
    assert all(kill.detection > 0 and kill.restart > 0 for kill in campaign.kills)
    checked = kills.check(scene, calm, STEPS)
    assert checked["epochs"] >= 1
    assert checked["repeated"] >= 0
    found = kills.ratios(scene, campaign)
    assert 0 < found["measured"] < found["1 h"] < found["7.9 h"] < 1
    assert found["formula"] == pytest.approx(found["measured"], abs=0.15)


def test_the_check_can_fail(work: Path) -> None:
    calm = kills.undisturbed(work, STEPS)
    other = kills.scene_in(work, "other", STEPS)
    other.folder.symlink_to(calm.folder)
    kills.check(other, calm, STEPS)
    for file in (calm.folder / "sabotage").glob("rank-00001.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:-1] + lines[-2:-1]))
    with pytest.raises(AssertionError):
        kills.check(other, calm, STEPS)


@pytest.mark.parametrize("later", [0.0, 0.05, 0.4])
def test_a_kill_while_the_guard_goes_back(later: float, work: Path) -> None:
    """Either the batches that it leaves out are saved already, or the bad one is found again."""
    if not (work / "digits").exists():
        demo.digits(work / "digits")
    if not (work / "without" / "done").exists():
        drill.undisturbed("without", work, kills.RANKS, {"skipped": list(WITHOUT)}, print)
    scene, make = drill.scene_of(f"back-{later}", work, kills.RANKS, work / "digits"), CATALOGUE["nan-picture"].harm
    assert make is not None
    scene.harm = make(kills.RANKS - 1)
    try:
        scene.start()
        scene.until(lambda: scene.events("guard"), "a verdict")
        time.sleep(later)
        scene.kill()
        scene.end()
        scene.start()
        assert scene.end() == 0, f"see {scene.folder}.log"
    finally:
        scene.kill()
    assert scene.losses() == drill.scene_of("without", work, kills.RANKS, work / "digits").losses()
    assert 1 <= len(scene.events("rollback")) <= 2
