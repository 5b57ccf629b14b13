"""A run's state from its folder alone, without a scheduler; and the page that shows it."""

import fcntl
import json
import time
from pathlib import Path
from typing import Any

import pytest

from slurm import page, status

NOW = 2_000_000.0


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps({"time": NOW - 100.0, **row}) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was at step 40 and broke off."""
    place = {"world": 8, "device": "NVIDIA H100"}
    lines(tmp_path / "events" / "rank-00000.jsonl", {"event": "start", "step": 0, "end": 100, **place})
    lines(tmp_path / "events" / "rank-00000.jsonl", {"event": "save", "step": 30, "of_step": 30})
    lines(tmp_path / "events" / "rank-00000.jsonl", {"event": "evaluation", "step": 40, "eval/top1": 0.7})
    lines(tmp_path / "events" / "agent.jsonl", {"event": "try", "try": "local.7.0", "nodes": []})
    (tmp_path / "lock").touch()
    return tmp_path


def test_a_run_that_broke_off(folder: Path) -> None:
    found = status.facts(folder)
    assert found["state"] == "not running"
    assert found["last_save"]["step"] == 30
    assert found["scores"] == {"eval/top1": 0.7}
    assert (found["world"], found["device"], found["try"]) == (8, "NVIDIA H100", "local.7.0")


def test_the_holder_of_the_lock_runs_and_is_not_disturbed(folder: Path) -> None:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status.facts(folder)["state"] == "running"
        beats = folder / "heartbeat" / "local.7.0"
        beats.mkdir(parents=True)
        told = {"time": time.time(), "moves": 90, "step": 45, "phase": "train", "longest": 1.0}
        (beats / "here.json").write_text(json.dumps(told))
        assert status.facts(folder)["why"] == "at train, step 45"
    assert status.facts(folder)["state"] == "not running"


@pytest.mark.parametrize(
    ("writer", "event", "state", "word"),
    [
        ("rank-00000", {"event": "stop", "reason": "SIGTERM"}, "stopped", "SIGTERM"),
        ("rank-00000", {"event": "diverged"}, "diverged", "same way"),
        ("agent", {"event": "decide", "action": "finish", "code": 137, "why": "given up"}, "failed", "137: given up"),
    ],
)
def test_how_a_run_ended(writer: str, event: dict[str, Any], state: str, word: str, folder: Path) -> None:
    lines(folder / "events" / f"{writer}.jsonl", event)
    found = status.facts(folder)
    assert found["state"] == state
    assert word in found["why"]
    (folder / "done").write_text("100\n")
    assert status.facts(folder)["state"] == "done"


def test_bad_nodes_and_failures_come_from_the_supervisors_folder(folder: Path) -> None:
    (folder / "agent").mkdir()
    (folder / "agent" / "budget.json").write_text(
        '{"crashes": 2, "furthest": 40, "bad_nodes": ["n3"], "slow_nodes": {"n2": 1.42}}'
    )
    shown = page.page(status.facts(folder), now=NOW)
    assert "bad nodes n3" in shown
    assert "slow      n2 (1.4 times" in shown
    assert "2 failures without progress" in shown


def test_the_page_holds_all_that_a_person_asks_for(folder: Path) -> None:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = page.page(status.facts(folder), ["the training"], now=NOW)
    assert shown.splitlines() == [
        f"{folder}: RUNNING, starting",
        "  try       local.7.0",
        "  on        8 x NVIDIA H100",
        "  the training",
        "  saved     step 30, 0:01:40 ago",
        "  scores    eval/top1 0.7000",
        "  event     0:01:40 ago  rank-00000: start  step 0, end 100, world 8, device NVIDIA H100",
        "  event     0:01:40 ago  rank-00000: save  step 30, of_step 30",
        "  event     0:01:40 ago  rank-00000: evaluation  step 40, eval/top1 0.7",
        "  event     0:01:40 ago  agent: try  ",
    ]


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    found = status.facts(tmp_path)
    assert (found["state"], found["last_save"]) == ("not running", None)
    assert page.page(found, now=NOW).count("\n") == 0
