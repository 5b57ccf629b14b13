"""One rank of a run that does nothing but save: its state is a formula of the step, so that any mixture is seen.

A life begins like a run's: it clears what an interrupted save left, takes the newest checkpoint that verifies, and
restores it, cut among its ranks in another way than before. Then it changes its state in place at every step, while a
copy of it is written.
"""

import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Checkpoint
from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.state import checkpoint, retention
from trainer.state.saver import Saver

SIZES = {"a": 200_001, "b": 65_536, "c": 30_011, "d": 7, "e": 1}  # elements of each parameter
KINDS = ("value", "exp_avg", "exp_avg_sq", "ema")
STATISTICS = {"n.running_mean": 64, "ema/n.running_mean": 64}


@dataclass(frozen=True)
class Life:
    """What the ranks of one start do.

    Attributes:
        steps: after so many the life ends by itself.
        again: save the step that was restored once more, in the place of its checkpoint.
        port: of the rendezvous.
        forced: false leaves all to the system's own time: nothing is forced to the disk.
    """

    root: Path
    world: int
    port: int
    wish: Checkpoint
    steps: int
    again: bool
    forced: bool = True


def live(life: Life, rank: int, told: Connection) -> None:
    """Restore, step and save.

    The first rank tells ("restored", step or 0, what was passed over), ("bad", what), ("ended", step), and of each save
    ("saved" or "skipped" or "failed", step, why).
    """
    if not life.forced:
        os.fsync = unforced
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{life.port}", rank=rank, world_size=life.world)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    member = Member(rank, life.world, 0, torch.device("cpu"), group)
    parts, statistics = pieces(member), {name: torch.zeros(size) for name, size in STATISTICS.items()}
    step = restored(life, member, parts, statistics, told)
    saver = Saver(life.root, life.wish, member, life.wish.asynchronous)
    for number in range(life.steps):
        if number or not (life.again and step):
            step += 1
        fill(parts, statistics, step)
        saver.save(step, state(step), parts, statistics, last=False)
        saver.settle()
        fill(parts, statistics, -step)  # training goes on at once
        tell(saver, member, told, wait=False)
        dist.barrier(group=group)
    tell(saver, member, told, wait=True)
    dist.barrier(group=group)
    if member.first:
        told.send(("ended", step))


def unforced(fd: object) -> None:
    """In place of fsync: nothing."""


def pieces(member: Member) -> list[Fragment]:
    """This rank's share of every parameter, to be filled."""
    found = []
    for name, size in SIZES.items():
        low, high = member.rank * size // member.world, (member.rank + 1) * size // member.world
        if high > low:
            flat = {kind: torch.zeros(high - low) for kind in KINDS}
            found.append(Fragment(name, low, flat.pop("value"), flat))
    return found


def expected(name: str, kind: str, low: int, count: int, step: int) -> Tensor:
    """What a stretch of a parameter holds at a step."""
    place = torch.arange(low, low + count, dtype=torch.float32)
    return place * 0.5 + 1000.0 * step + 10.0 * KINDS.index(kind) + len(name) + ord(name[0])


def fill(parts: list[Fragment], statistics: dict[str, Tensor], step: int) -> None:
    """Let the state be that of a step."""
    for part in parts:
        for kind, tensor in {"value": part.value, **part.moments}.items():
            tensor.copy_(expected(part.name, kind, part.offset, len(tensor), step))
    for name, tensor in statistics.items():
        tensor.copy_(expected(name, "value", 0, len(tensor), step))


def state(step: int) -> dict[str, Any]:
    """The small state of a step."""
    return {"step": step, "cursor": 7 * step}


def restored(life: Life, member: Member, parts: list[Fragment], statistics: dict[str, Tensor], told: Connection) -> int:
    """The step that this life goes on from; what is wrong with its state is told."""
    if member.first:
        retention.clear(life.root)
    dist.barrier(group=member.control)
    passed: list[str] = []
    saved = checkpoint.newest(life.root, member, passed.append)
    if saved is None:
        if member.first:
            told.send(("restored", 0, passed))
        return 0
    checkpoint.restore(saved, parts, statistics)
    bad = [f"rank {member.rank}: {text}" for text in wrong(saved.step, parts, statistics)]
    bad += [] if saved.state == {"format": 1, **state(saved.step)} else [f"state {saved.state}"]
    every: list[list[str]] = [[] for _ in range(member.world)]
    dist.all_gather_object(every, bad, group=member.control)
    steps = [0] * member.world
    dist.all_gather_object(steps, saved.step, group=member.control)
    if member.first:
        for text in [text for texts in every for text in texts] + (
            [f"ranks at {steps}"] if len(set(steps)) > 1 else []
        ):
            told.send(("bad", text))
        told.send(("restored", saved.step, passed))
    saved.hold.release()
    return saved.step


def wrong(step: int, parts: list[Fragment], statistics: dict[str, Tensor]) -> list[str]:
    """Names of what is not the state of a step, to the bit."""
    found = []
    for part in parts:
        for kind, tensor in {"value": part.value, **part.moments}.items():
            if not torch.equal(tensor, expected(part.name, kind, part.offset, len(tensor), step)):
                found.append(f"{kind} of {part.name}")
    return found + [
        name
        for name, tensor in statistics.items()
        if not torch.equal(tensor, expected(name, "value", 0, len(tensor), step))
    ]


def tell(saver: Saver, member: Member, told: Connection, wait: bool) -> None:
    """Tell of the saves that ended."""
    for outcome in saver.finished(wait):
        if member.first:
            kind = "skipped" if "left out" in outcome.problem else "failed" if outcome.problem else "saved"
            told.send((kind, outcome.step, outcome.problem))
