"""Signs of life of many nodes: read cheaply, late ones found, damaged files passed over."""

import json
import time
from pathlib import Path

import pytest

from slurm import beat


def tell(folder: Path, host: str, moves: int, step: int = 0, phase: str = "train", longest: float = 0.0) -> None:
    told = {"time": time.time(), "moves": moves, "step": step, "phase": phase, "longest": longest}
    (folder / f"{host}.json").write_text(json.dumps(told))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("slurm.beat.time.monotonic", lambda: now[0])
    return now


def test_a_run_that_moves_is_well(tmp_path: Path, clock: list[float]) -> None:
    watch = beat.Watch(tmp_path, first=1800, least=60, slow=900)
    for moves in range(1, 50):
        tell(tmp_path, "n1", moves, step=moves)
        clock[0] += 59
        assert watch.look() == ""
    assert watch.step == 49


def test_a_node_that_stops_moving_is_found_and_named(tmp_path: Path, clock: list[float]) -> None:
    watch = beat.Watch(tmp_path, first=1800, least=60, slow=900)
    tell(tmp_path, "n1", 5)
    tell(tmp_path, "n2", 5)
    assert watch.look() == ""
    clock[0] += 61
    tell(tmp_path, "n1", 6)
    assert "60 s on n2 at train" in watch.look()


def test_a_long_step_has_its_time(tmp_path: Path, clock: list[float]) -> None:
    watch = beat.Watch(tmp_path, first=1800, least=60, slow=900)
    tell(tmp_path, "n1", 5, longest=100.0)
    watch.look()
    clock[0] += 399
    assert watch.look() == ""
    clock[0] += 2
    assert "400 s" in watch.look()


@pytest.mark.parametrize("who", ["n1", "n2~3"])
@pytest.mark.parametrize("phase", ["data", "save", "evaluate"])
def test_all_wait_for_a_rank_that_may_take_long(who: str, phase: str, tmp_path: Path, clock: list[float]) -> None:
    watch = beat.Watch(tmp_path, first=1800, least=60, slow=900)
    tell(tmp_path, "n2", 5)
    tell(tmp_path, who, 5, phase=phase)
    watch.look()
    clock[0] += 899
    assert watch.look() == ""
    (tmp_path / f"{who}.json").unlink()
    if who == "n1":
        tell(tmp_path, "n1", 6)
    assert "60 s on n2" in watch.look()


def test_the_start_has_a_deadline_of_its_own(tmp_path: Path, clock: list[float]) -> None:
    watch = beat.Watch(tmp_path, first=1800, least=60, slow=900)
    clock[0] += 1799
    assert watch.look() == ""
    tell(tmp_path, "n1", 0, phase="start")
    assert watch.look() == ""
    clock[0] += 2
    assert "no step within 1800 s" in watch.look()


def test_damaged_files_are_no_sign_of_life(tmp_path: Path) -> None:
    (tmp_path / "n1.json").write_text('{"moves": 1')
    (tmp_path / "n2.json").write_text('{"moves": "x", "step": 1, "phase": "train", "longest": 0}')
    (tmp_path / "n3.json.77.tmp").write_text("{}")
    tell(tmp_path, "n4", 3)
    assert set(beat.scan(tmp_path)) == {"n4"}
    assert beat.scan(tmp_path / "absent") == {}


def test_a_thousand_nodes_cost_less_than_a_hundredth_of_a_core(tmp_path: Path) -> None:
    for number in range(1000):
        tell(tmp_path, f"node{number:04d}", 1)
    watch = beat.Watch(tmp_path, first=1800, least=60, slow=900)
    began = time.process_time()
    for _ in range(5):
        assert watch.look() == ""
    spent = (time.process_time() - began) / 5
    print(f"{spent * 1000:.1f} ms of processor time for a look at 1,000 nodes")
    assert len(watch._moves) == 1000
