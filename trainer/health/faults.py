"""The catalogue of `coatnet drill`: how each fault is made, on real processes and files of a tiny run.

What comes from outside is done to the processes and files; what happens inside a rank, by `trainer/health/sabotage.py`.
"""

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.health.scene import DrillError, Scene
from trainer.tracking.journal import whole_lines

AT = 13  # the step after which a fault strikes
FULL = 1 << 20  # bytes that a file may have on the disk that is full
BATCH = 64  # samples of a global batch
HARMED = 21  # the step that something is wrong with inside a rank
WITHOUT = (HARMED - 3, HARMED + 1)  # batches that a rollback leaves out: from two before the bad one on


@dataclass(frozen=True)
class Fault:
    """One entry of the catalogue.

    Attributes:
        strike: makes it, when the run has done `AT` steps, or waits for it; may give its moment (unix time), else it
            is the one at which this is called.
        codes: exit codes with which the command may end; empty: it must go on by itself.
        ranks: that it needs.
        noticed: once the run goes on, when it told of the fault (unix time), 0 for not yet; None: the end of the
            command tells.
        harm: of (number of the last rank), what is put into the ranks for it from the start.
        without: whether the run goes on without the batches `WITHOUT`.
    """

    purpose: str
    strike: Callable[[Scene], float | None]
    codes: tuple[int, ...] = ()
    ranks: int = 1
    noticed: Callable[[Scene], float] | None = None
    harm: Callable[[int], Mapping[str, Any]] | None = None
    without: bool = False


def _kill_rank(scene: Scene) -> None:
    os.kill(scene.ranks()[-1], signal.SIGKILL)


def _kill_all(scene: Scene) -> None:
    """As a power cut does; from the command on, so that nobody reports a dead rank."""
    scene.kill()


def _kill_command(scene: Scene) -> None:
    """The ranks are asked to stop by the system, save and leave."""
    ranks = scene.ranks()
    assert scene.process is not None
    scene.process.kill()
    scene.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "the ranks' leaving", running=False)


def _ask(scene: Scene) -> None:
    assert scene.process is not None
    scene.process.send_signal(signal.SIGTERM)


def _suspend_rank(scene: Scene) -> None:
    os.kill(scene.ranks()[-1], signal.SIGSTOP)


def _fill_disk(scene: Scene) -> None:
    """No file of the ranks may grow beyond a limit: writing fails in the middle of a checkpoint, as on a full disk."""
    ranks = scene.ranks()
    limits = {rank: resource.prlimit(rank, resource.RLIMIT_FSIZE) for rank in ranks}
    for rank in ranks:
        resource.prlimit(rank, resource.RLIMIT_FSIZE, (FULL, limits[rank][1]))

    def free() -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(rank, resource.RLIMIT_FSIZE, limits[rank])

    scene.mend = free


def _damage_checkpoint(scene: Scene, spoil: Callable[[bytearray], object]) -> None:
    """Kill everything, then spoil the largest file of the newest checkpoint."""
    scene.kill()
    scene.end()
    files = [path for path in scene.newest().iterdir() if path.suffix == ".safetensors"]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    spoil(content)
    victim.write_bytes(content)
    scene.notes["spoilt"] = str(scene.newest())


def _flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def _cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def _passed_over(scene: Scene) -> float:
    """When the start that came after told that it passed over the spoilt checkpoint."""
    origin = scene.events("origin")[-1]
    if not any(scene.notes["spoilt"] in text for text in origin["passed_over"]):
        raise DrillError(f"went on from {origin['source']}, and did not notice that {scene.notes['spoilt']} is damaged")
    return float(origin["time"])


def _damage_samples(scene: Scene) -> None:
    """A stretch of every training shard is overwritten; a copy from elsewhere puts it right before the next start."""
    shards = sorted(scene.data.rglob("*.tar"))
    aside = {shard: shard.read_bytes() for shard in shards}
    for shard, content in aside.items():
        with shard.open("r+b") as file:
            file.seek(len(content) // 4)
            file.write(b"\x55" * (len(content) // 2))

    def restore() -> None:
        for shard, content in aside.items():
            shard.write_bytes(content)

    scene.mend = restore


def _harmed(scene: Scene) -> float:
    """Wait until a rank has done a harmed step; when it began."""

    def began() -> float:
        notes = [note for file in (scene.folder / "sabotage").glob("rank-*.jsonl") for note in whole_lines(file)]
        return min((float(note["time"]) for note in notes if note["harm"]), default=0.0)

    return float(scene.until(began, "the harmed step"))


def _verdict(kind: str, scene: Scene) -> float:
    """When the guard told of the harm.

    Raises:
        DrillError: it blames another rank than the last, or another step.
    """
    event = next((event for event in scene.events("guard") if event["of"] == kind), None)
    if event is None:
        return 0.0
    last = scene.events("start")[0]["world"] - 1
    if event["rank"] and last not in event["rank"]:
        raise DrillError(f"rank {last} was harmed, and {event['rank']} is blamed")
    if event["since"] > HARMED or event["of_step"] < HARMED:
        raise DrillError(f"step {HARMED} was harmed, and {event['since']} to {event['of_step']} are blamed")
    return float(event["time"])


def _ended(scene: Scene) -> float:
    """When the supervisor saw that a try had failed."""
    return float(next((row["time"] for row in scene.supervised("ended") if row["code"]), 0.0))


def _not_saved(scene: Scene) -> float:
    """When the run told of a save that failed."""
    return float(next(iter(scene.events("save_failed")), {"time": 0})["time"])


CATALOGUE: dict[str, Fault] = {
    "kill-rank": Fault("kill -9 of one rank: all are started again", _kill_rank, noticed=_ended),
    "kill-all": Fault("kill -9 of the command, the ranks and their loaders at once", _kill_all, (-9,)),
    "kill-command": Fault("kill -9 of the command alone: its ranks save and leave", _kill_command, (-9,)),
    "sigterm": Fault("SIGTERM, as before a preemption", _ask, (75,)),
    "stuck-rank": Fault("SIGSTOP of one rank: all are started again", _suspend_rank, ranks=2, noticed=_ended),
    "disk-full": Fault("no room for a checkpoint (a limit on file sizes stands in)", _fill_disk, noticed=_not_saved),
    "bit-flip": Fault(
        "one bit of the newest checkpoint, after a kill -9",
        lambda scene: _damage_checkpoint(scene, _flip),
        (-9,),
        noticed=_passed_over,
    ),
    "truncated": Fault(
        "the newest checkpoint cut in half, after a kill -9",
        lambda scene: _damage_checkpoint(scene, _cut),
        (-9,),
        noticed=_passed_over,
    ),
    "nan-picture": Fault(
        "one picture is NaN: back, and on without it",
        _harmed,
        noticed=partial(_verdict, "nonfinite"),
        harm=lambda last: {"nan_at": [HARMED * BATCH - 1]},
        without=True,
    ),
    "spike": Fault(
        "a batch with a far too large loss: back, and on without it",
        _harmed,
        noticed=partial(_verdict, "spike"),
        harm=lambda last: {"scaled": [(HARMED - 1) * BATCH, HARMED * BATCH]},
        without=True,
    ),
    "drift": Fault(
        "a statistic of one rank changes: back",
        _harmed,
        ranks=2,
        noticed=partial(_verdict, "drift"),
        harm=lambda last: {"flip": [last, HARMED]},
    ),
    "slow-rank": Fault(
        "one rank computes longer: told, and borne",
        _harmed,
        ranks=2,
        noticed=partial(_verdict, "slow_rank"),
        harm=lambda last: {"slow": [last, HARMED, HARMED + 5]},
    ),
    "damaged-samples": Fault("training shards overwritten; mended before the next start", _damage_samples, (76,)),
}
