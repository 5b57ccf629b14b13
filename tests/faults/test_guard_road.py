"""A run that the guard has to give up ends with its own code, a clear last line and a state that can be looked at."""

from pathlib import Path

import pytest

from configs.guard import Guard
from tests.parallel.test_guard import BATCH, case, events, train, weights, write_pictures

pytestmark = pytest.mark.timeout(300)


def test_used_up_budget_stops_with_77(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "data")
    watch = Guard(window=8, nonfinite="rollback", rollback_steps=0, skip_batches=1, budget=1)
    bad = [5 * BATCH, 6 * BATCH + 1]
    code, seen = train(tmp_path, {"doomed": case(tmp_path, "doomed", watch, nan_at=bad)}, 2)
    assert code == 77
    found = events(tmp_path, "doomed", "guard")
    assert [(event["of"], event["batch"], event["action"]) for event in found] == [
        ("nonfinite", 5, "rollback"),
        ("nonfinite", 6, "stop"),
    ]
    assert found[1]["because"] == "its budget of 1 in 10000 steps is used up"
    assert len(events(tmp_path, "doomed", "diverged")) == 1
    said = capfd.readouterr().out.splitlines()
    (last,) = [number for number, line in enumerate(said) if line.startswith("stopped by the guard at step ")]
    assert "its budget of 1" in said[last]
    assert not [line for line in said[last + 1 :] if line]
    assert weights(tmp_path, "doomed", 4)  # the newest good state stays
    assert all(rank["doomed"]["code"] == 77 for rank in seen)


@pytest.mark.slow
def test_divergence_stops_with_77_and_says_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "data")
    watch = Guard(window=8, divergence_steps=5)
    code, _ = train(tmp_path, {"lost": case(tmp_path, "lost", watch, scaled=[8 * BATCH, 1000 * BATCH], steps=40)}, 2)
    assert code == 77
    found = events(tmp_path, "lost", "guard")
    assert [(event["since"], event["action"]) for event in found if event["of"] == "divergence"] == [(9, "stop")]
    assert "Lower optim.lr or lengthen the warm-up" in capfd.readouterr().out
    assert weights(tmp_path, "lost", 12)  # saved before anybody could know
