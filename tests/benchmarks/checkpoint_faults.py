"""The campaigns against saves: SIGKILL, damage, power cuts, full disks; each trial from its seed.

    python tests/benchmarks/checkpoint_faults.py FOLDER [OUT]

FOLDER/trials.jsonl keeps every chain that is done: broken off, it goes on behind the last one. The record is written to
tests/records unless OUT is given. Power cuts and full disks need root. About half an hour on two cores.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from configs.schema import Checkpoint  # noqa: E402
from tests.faults import disks  # noqa: E402
from tests.faults.checkpoint_campaign import MODES, Ranks, Trial, chain, damage, let_end  # noqa: E402
from tests.faults.disk_campaign import full_chain, power_chain  # noqa: E402
from tests.faults.save_rank import Life  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.launch import free_port  # noqa: E402
from trainer.machine import environment  # noqa: E402
from trainer.state import checkpoint, retention  # noqa: E402
from trainer.state.listing import verified  # noqa: E402

Rows = list[dict[str, Any]]
ROUNDS = 40  # spoilt copies of each file


def spoilt_files(folder: Path, seed: int) -> Rows:
    """Every file of a checkpoint of three ranks spoilt `ROUNDS` times: what was done, and whether it was seen."""
    root, draw = folder / "saved", random.Random(seed)
    trial = Trial(seed, "ends", 3, True, 0)
    let_end(Ranks(Life(root, 3, free_port(), Checkpoint(), 2, again=False)), trial)
    newest, rows = retention.found(root)[0], []
    for name in [path.name for path in sorted(newest.iterdir()) for _ in range(ROUNDS)]:
        copy = folder / newest.name
        shutil.copytree(newest, copy)
        what = damage(copy / name, draw)
        words = " ".join(verified(copy)["damage"])
        named = name in words or (name == "COMPLETE" and "manifest.json" in words)
        bad = [] if checkpoint.damage(copy) and named else [f"{name}: {what} was not seen"]
        rows.append({"file": name, "what": what, "bad": bad})
        shutil.rmtree(copy)
    return rows


def facts(trials: list[Trial]) -> Rows:
    """Trials as JSON."""
    return [trial.facts for trial in trials]


def campaigns() -> dict[str, tuple[int, Callable[[Path, int], Rows]]]:
    """Name to the number of chains, and what makes one in a folder from its seed."""
    found: dict[str, tuple[int, Callable[[Path, int], Rows]]] = {
        "kills": (14, lambda folder, seed: facts(chain(folder / "root", seed, kills=15, damages=0.25))),
        "files": (1, spoilt_files),
    }
    if not disks.impossible():
        found |= {
            "power": (5, lambda folder, seed: facts(power_chain(folder, seed, cuts=10))),
            "power, nothing forced": (1, partial(_unforced)),
            "full": (8, lambda folder, seed: facts(full_chain(folder, seed))),
        }
    return found


def _unforced(folder: Path, seed: int) -> Rows:
    """The same power cuts where nothing is forced to the disk: what the others must not show."""
    return facts(power_chain(folder, seed, cuts=10, forced=False))


def summarise(done: dict[str, Rows]) -> dict[str, str]:
    """What a reader wants to know."""
    kills = [row for row in done["kills"] if row["mode"] in MODES]
    by_mode = ", ".join(f"{mode} {sum(row['mode'] == mode for row in kills)}" for mode in MODES)
    passed = sum(bool(row["passed"]) for row in done["kills"])
    files = done["files"]
    summary = {
        "SIGKILL": f"{len(kills)} ({by_mode}), {sum(row['inside'] for row in kills)} of them left a save unfinished; "
        f"{passed} starts passed over a damaged or unfinished one; bad states restored, starts that could not go on, "
        f"saved steps lost: {_bad(done['kills'])}",
        "spoilt files": f"{len(files)}, {ROUNDS} copies of each of {len(files) // ROUNDS}; not seen: {_bad(files)}",
    }
    if "power" in done:
        cuts, control = (
            [row for row in done[name] if row["mode"] == "power"] for name in ("power", "power, nothing forced")
        )
        full = [row for row in done["full"] if row["mode"] == "full"]
        summary["power cuts"] = (
            f"{len(cuts)} on ext4, {sum(row['inside'] for row in cuts)} within a save: "
            f"{_bad(done['power'])} bad; with nothing forced to the disk "
            f"{_bad(control)} of {len(control)} lose what was said to be saved"
        )
        summary["full disks"] = (
            f"{len(full)}, {sum(row['failed'] for row in full)} saves failed: {_bad(done['full'])} bad"
        )
    return summary


def _bad(rows: Rows) -> int:
    """How many of these are bad."""
    return sum(bool(row["bad"]) for row in rows)


def main(folder: Path, out: Path) -> None:
    """Make what is missing of the campaigns, and write the record."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "trials.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["campaign"], row["seed"]) for row in rows}
    for name, (chains, make) in campaigns().items():
        for seed in range(chains):
            if (name, seed) in known:
                continue
            scratch = folder / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            rows.append({"campaign": name, "seed": seed, "trials": make(scratch, seed)})
            with log.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            bad = [text for row in rows[-1]["trials"] for text in row["bad"]]
            print(name, seed, len(rows[-1]["trials"]), bad, flush=True)
    done = {name: [trial for row in rows if row["campaign"] == name for trial in row["trials"]] for name in campaigns()}
    record = bench.Record(
        name="checkpoint-faults",
        command="python tests/benchmarks/checkpoint_faults.py FOLDER",
        facts=environment.facts("cpu"),
        config={"kills a chain": 15, "spoilt between starts": 0.25, "rounds of each file": ROUNDS, "worlds": [1, 2, 3]},
        unit="1 where something was wrong, one value per start or spoilt file",
        samples={name: [float(bool(row["bad"])) for row in trials] for name, trials in done.items()},
        summary=summarise(done),
    )
    print(record.write(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "tests" / "records")
