"""What it costs to watch 1,000 ranks, each on a node of its own: `python tests/benchmarks/supervision.py [SECONDS]`.

Four processes play the nodes: each node writes its sign of life every two seconds, as trainer/health/pulse.py does, and
an event every ten, to a file of its own. This process does what the supervisor and `coatnet status --watch` do every
five seconds: read all signs of life, and what is new in all event files. Its processor time over the time that passed
is the share of one core that is recorded.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from slurm import agent, beat  # noqa: E402
from slurm.events import Reader  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.machine import environment  # noqa: E402

NODES, WRITERS = 1000, 4
BEAT, EVENT = 2.0, 10.0  # seconds between two signs of life of a node, and between two events


def play(folder: Path, numbers: range, until: float) -> None:
    """Be some of the nodes, until a moment of the monotonic clock."""
    beats = beat.folder(folder, "1.0.0")
    moves = 0
    while time.monotonic() < until:
        began = time.monotonic()
        moves += 1
        for number in numbers:
            told = {"time": time.time(), "moves": moves, "step": moves, "phase": "train", "longest": 1.0}
            path = beats / f"node{number:04d}.json"
            path.with_suffix(".tmp").write_text(json.dumps(told))
            os.replace(path.with_suffix(".tmp"), path)
            if (moves + number) % round(EVENT / BEAT) == 0:
                event = {"time": time.time(), "event": "save", "step": moves, "of_step": moves, "seconds": 1.0}
                with (folder / "events" / f"rank-{number:05d}.jsonl").open("a") as file:
                    file.write(json.dumps(event) + "\n")
        time.sleep(max(0.0, BEAT - (time.monotonic() - began)))


def watch(folder: Path, seconds: float) -> dict[str, list[float]]:
    """Look every five seconds; processor seconds of each look, at signs of life and at events."""
    signs, reader = beat.Watch(beat.folder(folder, "1.0.0"), 1800.0, beat.LEAST, 900.0), Reader(folder)
    spent: dict[str, list[float]] = {"signs of life": [], "events": []}
    seen, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(agent.LOOK)
        for name, look in (("signs of life", signs.look), ("events", reader.new)):
            began = time.process_time()
            found = look()
            spent[name].append(time.process_time() - began)
            seen += len(found) if name == "events" else 0
            assert name == "events" or not found, found
    assert seen >= NODES, f"only {seen} events came"
    assert signs.step > 0
    return spent


def main(seconds: float) -> None:
    """Measure, and write the record."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        beat.folder(folder, "1.0.0").mkdir(parents=True)
        (folder / "events").mkdir()
        until, share = time.monotonic() + seconds + 10, NODES // WRITERS
        players = [
            multiprocessing.Process(target=play, args=(folder, range(number * share, (number + 1) * share), until))
            for number in range(WRITERS)
        ]
        for player in players:
            player.start()
        spent = watch(folder, seconds)
        for player in players:
            player.join()
    shares = {name: sum(values) / len(values) / agent.LOOK for name, values in spent.items()}
    summary = {
        "watching 1,000 ranks": f"{sum(shares.values()):.2%} of one core (limit 1 %)",
        "of it": ", ".join(f"{name} {value:.2%}" for name, value in shares.items()),
    }
    config = {"nodes": NODES, "seconds": seconds, "look": agent.LOOK, "beat": BEAT, "event": EVENT}
    command = f"python tests/benchmarks/supervision.py {seconds:g}"
    record = bench.Record("supervision", command, environment.facts("cpu"), config, "s", spent, summary)
    print(record.write(ROOT / "tests" / "records"), summary)
    if sum(shares.values()) >= 0.01:
        sys.exit("more than 1 % of one core")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0)
