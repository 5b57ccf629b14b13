"""Event files of many writers are merged when read, each line once, and damage is passed over."""

import json
import time
from pathlib import Path
from typing import Any

from slurm import beat
from slurm.events import Reader, tail

LOOK = 5.0  # seconds between two looks of the supervisor


def write(folder: Path, writer: str, *events: dict[str, Any]) -> None:
    (folder / "events").mkdir(exist_ok=True)
    with (folder / "events" / f"{writer}.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_events_come_once_and_in_order(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    assert reader.new() == []
    write(tmp_path, "agent", {"time": 2.0, "event": "try"}, {"time": 5.0, "event": "hung"})
    write(tmp_path, "rank-00000", {"time": 1.0, "event": "start"}, {"time": 3.0, "event": "save"})
    found = reader.new()
    assert [event["event"] for event in found] == ["start", "try", "save", "hung"]
    assert [event["writer"] for event in found] == ["rank-00000", "agent", "rank-00000", "agent"]
    assert reader.new() == []
    with (tmp_path / "events" / "agent.jsonl").open("a") as file:
        file.write('{"time": 7.0, "event": "de')
        file.flush()
        assert reader.new() == []  # half a line waits for the rest
        file.write('cide"}\nnot json\n[1]\n{"event": "no time"}\n')
    assert [event["event"] for event in reader.new()] == ["decide"]
    (tmp_path / "events" / "agent.jsonl").write_text('{"time": 9.0, "event": "anew"}\n')
    assert [event["event"] for event in reader.new()] == ["anew"]


def test_a_long_file_is_read_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(20_000):
            file.write(json.dumps({"time": float(step), "step": step, "train/loss": 1 / (step + 1)}) + "\n")
    rows = tail(path, 1000)
    assert [row["step"] for row in rows] == list(range(20_000 - len(rows), 20_000))
    assert 1 < len(rows) < 30
    assert not tail(tmp_path / "none")


def test_a_thousand_writers_cost_less_than_a_hundredth_of_a_core(tmp_path: Path) -> None:
    """The promise itself, of processor time: one look at the signs of life and new events of 1,000 nodes."""
    beats = tmp_path / "heartbeat" / "1.0.0"
    beats.mkdir(parents=True)
    told = {"time": time.time(), "moves": 1, "step": 1, "phase": "train", "longest": 1.0}
    for number in range(1000):
        (beats / f"node{number:04d}.json").write_text(json.dumps(told))
        write(tmp_path, f"rank-{number:05d}", *({"time": float(n), "event": "save"} for n in range(20)))
    watch, reader = beat.Watch(beats, first=1800, least=60, slow=900), Reader(tmp_path)
    assert len(reader.new()) == 20_000
    spent = []
    for number in range(4):
        for writer in range(0, 1000, 20):  # each node has something to tell once in 100 s
            write(tmp_path, f"rank-{writer + number:05d}", {"time": 30.0, "event": "save"})
        began = time.process_time()
        assert watch.look() == ""
        assert len(reader.new()) == 50
        spent.append(time.process_time() - began)
    print(f"{min(spent) / LOOK:.2%} of a core")
    assert min(spent) < 0.01 * LOOK
