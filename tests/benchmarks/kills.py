"""Kills one rank of a training at random steps, again and again; holds the end against an undisturbed run's.

    python tests/benchmarks/kills.py [--kills 50] [--steps 300] [--seed 0] [--at-most N] [--work FOLDER] [--out FOLDER]

It is one command of `coatnet train`, whose own supervisor starts the ranks again after each kill. Writes the records
`kills` and `ettr` to --out (tests/records unless it is given) when all kills are done. Broken off, or after --at-most
kills in one call, the same command goes on in --work. A kill and the new start take about 10 s on two quiet cores, and
should have them alone.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from data_pipeline.building import demo  # noqa: E402
from data_pipeline.manifest import open_dataset  # noqa: E402
from trainer.bench import record as bench  # noqa: E402
from trainer.health import drill, ettr, goodput  # noqa: E402
from trainer.health.faults import BATCH  # noqa: E402
from trainer.health.goodput import NS  # noqa: E402
from trainer.health.scene import Scene  # noqa: E402
from trainer.machine import environment  # noqa: E402
from trainer.tracking.journal import whole_lines  # noqa: E402

RANKS = 2
LATER = 0.3  # seconds at most from the figures of a step to the kill, so that it falls anywhere in the next ones


@dataclass
class Kill:
    """One kill -9.

    Attributes:
        step: after whose figures it was due.
        rank: that was hit.
        detection: seconds until the supervisor saw that all ranks had ended.
        restart: seconds from then to the first figures of a new step.
    """

    step: int
    rank: int
    detection: float = 0.0
    restart: float = 0.0


@dataclass
class Campaign:
    """What was done so far; kept in a file from one call to the next.

    Attributes:
        paused: seconds in which no call of this program was at work.
        left: unix time at which the last call ended.
    """

    kills: list[Kill] = field(default_factory=list)
    paused: float = 0.0
    left: float = 0.0

    def write(self, path: Path) -> None:
        """Keep it."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(path: Path) -> "Campaign":
        """What was kept; nothing where nothing was."""
        if not path.exists():
            return Campaign()
        given = json.loads(path.read_text())
        return Campaign([Kill(**kill) for kill in given["kills"]], given["paused"], given["left"])


def planned(kills: int, steps: int, seed: int) -> list[tuple[int, int, float]]:
    """(step, rank, seconds later) of every kill, in their order."""
    draw = random.Random(seed)
    due = sorted(draw.sample(range(1, steps - 10), kills))
    return [(step, draw.randrange(RANKS), draw.uniform(0, LATER)) for step in due]


def scene_in(work: Path, name: str, steps: int) -> Scene:
    """A run that notes its samples."""
    if not (work / "digits").exists():
        demo.digits(work / "digits")
    scene = drill.scene_of(name, work, RANKS, work / "digits", steps)
    scene.harm = {}
    return scene


def undisturbed(work: Path, steps: int) -> Scene:
    """The run to compare with; made once."""
    scene = scene_in(work, "calm", steps)
    if not (scene.folder / "done").exists():
        scene.start()
        try:
            assert scene.end() == 0, f"see {scene.folder}.log"
        finally:
            scene.kill()
    return scene


def killed(work: Path, steps: int, plan: list[tuple[int, int, float]], at_most: int) -> tuple[Scene, Campaign]:
    """The run that is killed; to its end, or for `at_most` kills."""
    scene, file = scene_in(work, "killed", steps), work / "campaign.json"
    scene.words += ["--restarts", str(len(plan))]
    campaign = Campaign.read(file)
    if (scene.folder / "done").exists():
        return scene, campaign
    campaign.paused += time.time() - campaign.left if campaign.left else 0.0
    done = len(campaign.kills)
    try:
        before = len(scene.rows())
        scene.start()
        scene.until(lambda: len(scene.rows()) > before, "a new step")
        for step, rank, later in plan[done : done + at_most]:
            campaign.kills.append(kill(scene, Kill(step, rank), later))
            print(f"{len(campaign.kills)}: {campaign.kills[-1]}", flush=True)
            campaign.write(file)
        if len(campaign.kills) < len(plan):
            assert scene.process is not None
            scene.process.terminate()
        assert scene.end() == (0 if len(campaign.kills) == len(plan) else 75), f"see {scene.folder}.log"
    finally:
        scene.kill()
        campaign.left = time.time()
        campaign.write(file)
    return scene, campaign


def kill(scene: Scene, due: Kill, later: float) -> Kill:
    """One kill, and what follows until the next new step; training goes on."""
    scene.until(lambda: scene.rows()[-1]["step"] >= due.step, f"step {due.step}")
    time.sleep(later)
    victim, ended = scene.ranks()[due.rank], len(scene.supervised("ended"))
    struck = time.time()
    os.kill(victim, signal.SIGKILL)
    scene.until(lambda: len(scene.supervised("ended")) > ended, "the end of the ranks")
    noticed, before = scene.supervised("ended")[-1], len(scene.rows())
    assert noticed["code"] == 137, noticed
    scene.until(lambda: len(scene.rows()) > before, "a new step")
    due.detection, due.restart = noticed["time"] - struck, scene.rows()[before]["time"] - noticed["time"]
    return due


def samples_of(scene: Scene) -> dict[int, str]:
    """Key of the sample at every global index, as the run that there is at the end took them.

    Raises:
        AssertionError: an index was taken twice.
    """
    taken: dict[int, str] = {}
    for file in sorted((scene.folder / "sabotage").glob("rank-*.jsonl")):
        last = {
            note["step"]: note["samples"] for note in whole_lines(file)
        }  # of a step that was made again, the last time
        for index, key in (pair for samples in last.values() for pair in samples):
            assert index not in taken, f"{key} at {index}: taken twice"
            taken[index] = key
    return taken


def check(scene: Scene, calm: Scene, steps: int) -> dict[str, Any]:
    """Hold the end of a killed run against an undisturbed one.

    Raises:
        AssertionError: what differs.
    """
    names = [file.name for file in calm.newest().glob("*.safetensors")]
    assert len(names) > RANKS
    assert calm.newest().name == scene.newest().name == f"step-{steps:08d}"
    for name in names:
        assert (scene.newest() / name).read_bytes() == (calm.newest() / name).read_bytes(), name
    assert scene.losses() == calm.losses()
    taken, split = samples_of(scene), open_dataset(scene.data).split("train")
    assert sorted(taken) == list(range(steps * BATCH))
    assert taken == samples_of(calm)
    epochs = len(taken) // split.samples
    for epoch in range(epochs):
        keys = Counter(taken[index] for index in range(epoch * split.samples, (epoch + 1) * split.samples))
        assert len(keys) == split.samples
        assert set(keys.values()) == {1}, f"epoch {epoch}"
    return {"epochs": epochs, "samples": split.samples, "repeated": len(scene.rows()) - steps}


def ratios(scene: Scene, campaign: Campaign) -> dict[str, Any]:
    """The run's effective training time ratio, from its event logs and the measured times; and for other rates."""
    found = ettr.measure(scene.folder)
    assert found is not None
    wall = found.wall - campaign.paused
    costs = replace(
        found.costs,
        detection=mean(kill.detection for kill in campaign.kills),
        restart=mean(kill.restart for kill in campaign.kills),  # also what the run's own clock does not see
    )
    book = goodput.Book.of(goodput.last_line(scene.folder / "events" / goodput.FILE) or {})
    per_step = book.spent["productive"] / NS / len(scene.losses())
    between = wall / len(campaign.kills)
    return {
        "measured": found.ratio * found.wall / wall,
        "formula": ettr.foretell(costs, between, drill.EVERY * per_step),
        "between": between,
        "costs": costs,
        **{f"{hours:g} h": ettr.foretell(costs, hours * 3600) for hours in ettr.HOURS},
    }


def waited(scene: Scene) -> list[float]:
    """Seconds that the supervisor held back a new start."""
    decided, begun = scene.supervised("decide"), scene.supervised("try")[1:]
    found = [after["time"] - before["time"] for before, after in zip(decided, begun, strict=False)]
    return [seconds for seconds in found if seconds > 1.0]


def records(scene: Scene, campaign: Campaign, checked: dict[str, Any], words: str, steps: int) -> list[bench.Record]:
    """What was found, as records."""
    found, facts, kills = ratios(scene, campaign), environment.facts("cpu"), campaign.kills
    costs: ettr.Costs = found["costs"]
    common: dict[str, Any] = {
        "command": f"python tests/benchmarks/kills.py {words}",
        "facts": facts,
        "config": {"recipe": "demo-digits", "words": scene.words[4:], "ranks": RANKS, "steps": steps},
    }
    times = {"noticed": [kill.detection for kill in kills], "restart": [kill.restart for kill in kills]}
    places = {"step": [float(kill.step) for kill in kills], "rank": [float(kill.rank) for kill in kills]}
    spread = {
        name: f"{median(values):.1f} s ({min(values):.1f} to {max(values):.1f} s)" for name, values in times.items()
    }
    waits = waited(scene)
    summary = {
        "kill -9 of one rank": f"{len(kills)} times in one training of {steps} steps",
        "weights, moments, statistics": "bitwise those of an undisturbed run, losses of all steps too",
        "samples": f"each of {checked['samples']:,} once in each of {checked['epochs']} epochs",
        "made again": f"{checked['repeated']} steps",
        **spread,
        "waits": f"{len(waits)} of {median(waits or [0.0]):.0f} s by the supervisor, after two failures without a save "
        "between them; they are in the restarts",
    }
    foretold = {f"at a failure every {hours:g} h": f"{found[f'{hours:g} h']:.2%}" for hours in ettr.HOURS}
    told = {
        "measured": f"{found['measured']:.1%} at a failure every {found['between']:.0f} s (the formula: "
        f"{found['formula']:.1%})",
        **foretold,
        "costs": f"noticed after {costs.detection:.1f} s, restart {costs.restart:.1f} s, a save stops training "
        f"{costs.stall:.3f} s and counts {costs.write:.3f} s later",
    }
    values = {name: [value] for name, value in {**found, **asdict(costs)}.items() if name != "costs"}
    return [
        bench.Record("kills", unit="seconds; steps, ranks", samples={**times, **places}, summary=summary, **common),
        bench.Record("ettr", unit="shares; seconds", samples=values, summary=told, **common),
    ]


def main(words: list[str]) -> int:
    """Go on with the campaign, and write its records when it is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-most", type=int, default=sys.maxsize)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "kills")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "records")
    wish = parser.parse_args(words)
    wish.work.mkdir(parents=True, exist_ok=True)
    calm = undisturbed(wish.work, wish.steps)
    scene, campaign = killed(wish.work, wish.steps, planned(wish.kills, wish.steps, wish.seed), wish.at_most)
    if len(campaign.kills) < wish.kills:
        print(f"{len(campaign.kills)} of {wish.kills} kills; the same command goes on")
        return 0
    checked = check(scene, calm, wish.steps)
    for record in records(scene, campaign, checked, f"--kills {wish.kills} --seed {wish.seed}", wish.steps):
        print(record.write(wish.out), *(f"{name} {value}" for name, value in record.summary.items()), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
