"""What a terminal shows of a run while it goes on: figures from its folder, and the progress line."""

import json
import math
from pathlib import Path

import pytest

from tests.pages import story
from trainer.tracking import live
from trainer.tracking.progress import ProgressLine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in the middle of its second attempt, a line of it half written."""
    made = story.write(tmp_path)
    (made / "done").unlink()
    lines = [line for line in story.figures(story.run_of(tmp_path, "x"), 1.0) if "train/loss" in line]
    kept = lines[: lines.index(next(line for line in lines if line["step"] == 190)) + 1]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    (made / "metrics.jsonl").write_text(text + '{"step": 200, "ti')
    return made


def test_where_a_run_is_and_what_it_cost(folder: Path) -> None:
    now = story.step_time(190, True) + 30
    found = live.facts(folder, now)
    assert (found.step, found.steps, found.done) == (190, story.STEPS, False)
    assert found.losses == pytest.approx([0.3 + 6 * math.exp(-step / 60) for step in range(10, 191, 10)])
    assert found.left == pytest.approx((story.STEPS - 190) * story.SECONDS)
    assert (found.mfu, found.silent, found.currency) == (0.41, 30.0, "USD")
    assert found.device_hours == pytest.approx(8 * (60 + 180 * 20 + 60 + 150 * 20) / 3600)
    assert found.cost == pytest.approx(2.5 * (found.device_hours or 0))
    told = live.lines(folder, now)
    assert told[0] == "story: step 190 of 300 (63%), ETA 0:36:40"
    assert told[1].startswith("  loss 0.5529 \u2588")
    assert "MFU 41.0%  goodput 82.6%" in told[2]
    assert told[3] == "  14.9 device-hours  0.658 TPUv3-core-days  37.33 USD"
    assert live.lines(folder, now + 3600)[-1] == "  no figures for 1:00:30"


def test_a_finished_run_and_one_without_a_line(folder: Path) -> None:
    (folder / "done").write_text("300\n")
    assert live.lines(folder)[0] == "story: step 190 of 300 (63%), finished"
    for name in ("metrics.jsonl", "done", "events/clock.jsonl"):
        (folder / name).unlink()
    assert live.lines(folder) == ["story: step 0 of 300 (0%)"]


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "time": 0.0}) + "\n" for step in range(50_000)))
    rows = live.last_rows(path)
    assert rows[-1]["step"] == 49_999
    assert 5_000 < len(rows) < 20_000
    assert [row["step"] for row in rows] == list(range(rows[0]["step"], 50_000))


def test_sparkline() -> None:
    assert live.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == live.BLOCKS
    assert live.sparkline([1.0, float("nan"), 0.0]) == "\u2588 \u2581"
    assert live.sparkline([5.0]) == "\u2581"
    assert live.sparkline([]) == ""
    assert len(live.sparkline(range(1000), 10)) == 10


def test_the_progress_line_says_speed_goodput_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("mine", 100, shown=True, currency="EUR")
    line.start(0)
    values = {"perf/images_per_second": 1234.5, "perf/mfu": 0.41, "perf/goodput": 0.97, "cost/money": 12.5}
    line.show(50, {**values, "train/loss": 0.25})
    line.show(60, {"perf/images_per_second": 10.0})
    line.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "mine  step 50/100  loss 0.2500  1,234.5 images/s  MFU 41.0%  goodput 97.0%  12.50 EUR  ETA 0:00:0"
    )
    assert second.startswith("mine  step 60/100  loss not finite  10.0 images/s  ETA 0:00:0")


def test_a_rank_that_is_not_shown_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("mine", 100, shown=False)
    line.show(50, {"perf/images_per_second": 1.0})
    assert capsys.readouterr().out == ""
