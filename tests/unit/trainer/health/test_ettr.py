"""The effective training time ratio of a hand-made event log, and the formula for other failure rates."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.health import ettr
from trainer.health.ettr import Costs, average, foretell, measure
from trainer.health.goodput import CLASSES, NS


def write_log(folder: Path) -> None:
    """Two attempts: 60 s of restart and 600 s of steps, of which 240 s are lost; 40 s pause; 60 s and 400 s of steps.

    Three saves stop training for 1, 2 and 9 s.
    """
    (folder / "events").mkdir(parents=True)
    spent = dict.fromkeys(CLASSES, 0) | {
        "productive": 760, "lost": 240, "restart": 110, "compile": 10, "down": 40, "save": 12, "data": 28,
    }  # fmt: skip
    sums = {name: seconds * NS for name, seconds in spent.items()}
    last = {"began": 0, "until": 1200 * NS, "spent": sums, "devices": sums, "attempts": 2, "ledger": {}}
    (folder / "events" / "clock.jsonl").write_text(json.dumps(last) + '\n{"torn')
    saves = [{"event": "save", "stall": stall, "write": 10 * stall} for stall in (1.0, 2.0, 9.0)]
    lines = [json.dumps(event) + "\n" for event in [{"event": "start"}, *saves]]
    (folder / "events" / "rank-00000.jsonl").write_text("".join(lines) + '{"event": "sa')


def test_a_hand_made_log(tmp_path: Path) -> None:
    assert measure(tmp_path) is None
    write_log(tmp_path)
    found = measure(tmp_path)
    assert found is not None
    assert (found.wall, found.attempts) == (1200.0, 2)
    assert found.ratio == pytest.approx(760 / 1200)
    assert found.costs == Costs(detection=40.0, restart=60.0, stall=2.0, write=20.0)


def test_the_formula_by_hand() -> None:
    """M = 1 h, 60 s to notice, 240 s to restart, saves of 1.8 s and 2 % of 10 s: T = sqrt(2 * 2 * 3600) = 120 s."""
    wanted = 120 / 122 * (3600 - 60 - 240 - 61 - 10) / 3600
    assert foretell(Costs(60, 240, 1.8, 10), 3600) == pytest.approx(wanted)
    # A save that takes 100 s to be written comes every 204 s only, and costs 4 s.
    wanted = 204 / 208 * (3600 - 60 - 240 - 104 - 100) / 3600
    assert foretell(Costs(60, 240, 2, 100), 3600) == pytest.approx(wanted)


def test_limits() -> None:
    assert foretell(Costs(0, 0, 0, 0), 3600) == 1
    assert foretell(Costs(3000, 3000, 2, 10), 3600) == 0
    assert average([Costs(1, 2, 3, 4), Costs(3, 2, 1, 0)]) == Costs(2, 2, 2, 2)
    assert ettr.HOURS == (7.9, 1.0)


seconds = st.floats(0.0, 1000.0)


@given(st.builds(Costs, seconds, seconds, seconds, seconds), st.floats(60.0, 1e6), st.floats(1.1, 10.0))
def test_a_ratio_that_grows_with_the_time_between_failures(costs: Costs, mtbf: float, factor: float) -> None:
    rare, often = foretell(costs, factor * mtbf), foretell(costs, mtbf)
    assert 0 <= often <= 1
    assert 0 <= rare <= 1
    assert math.isfinite(rare)
    assert rare >= often - 1e-9
