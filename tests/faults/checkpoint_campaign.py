"""Campaigns against saves, each trial a function of its seed: SIGKILL at any moment, damage on the disk, power cuts.

A chain is the life of one folder of checkpoints: ranks start, restore, save as fast as they can, are killed; others
start, fewer or more of them. What a chain finds is a list of trials, one for each start; nothing may be bad.
"""

import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from configs.schema import Checkpoint
from tests.faults.save_rank import Life, live
from trainer.launch import free_port
from trainer.state import retention

MODES = ("all", "one", "writer")  # of SIGKILL: every rank; one of them; one in the middle of writing its file
PATIENCE = 60.0  # seconds for what takes parts of one
WORLDS = (1, 2, 3)


@dataclass
class Trial:
    """One start of the ranks and how it was ended.

    Attributes:
        mode: one of MODES, "ends" of a life that nobody disturbs, "power" or "full".
        inside: whether it was ended in the middle of a save, as the folder shows.
        known: the newest step that was on disk for sure when it began.
        restored: the step that it went on from; -1: it did not get so far.
        saves, skipped, failed: that it finished; that it left out because one was under way; that the disk refused.
        passed: checkpoints that it passed over, and why.
        bad: whatever must not be.
    """

    seed: int
    mode: str
    world: int
    asynchronous: bool
    known: int
    inside: bool = False
    restored: int = -1
    saves: int = 0
    skipped: int = 0
    failed: int = 0
    passed: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Ranks:
    """The processes of one start."""

    def __init__(self, life: Life) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.save_rank"])
        here, there = context.Pipe()
        self.told: Connection = here
        self.processes = [context.Process(target=live, args=(life, rank, there)) for rank in range(life.world)]
        for process in self.processes:
            process.start()
        there.close()

    def hear(self, trial: Trial, until: Callable[[str], bool], patience: float) -> bool:
        """Take in what the first rank tells until some kind of message; whether it came."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not wait([self.told], timeout=max(0.0, deadline - time.monotonic())):
                break
            try:
                kind, *facts = self.told.recv()
            except (EOFError, OSError):
                break
            if kind == "restored":
                trial.restored, trial.passed = facts
            if kind == "saved":
                trial.saves += 1
                trial.known = max(trial.known, facts[0])
            if kind == "skipped":
                trial.skipped += 1
            if kind == "failed":
                trial.failed += 1
            if kind == "bad" or (kind == "failed" and trial.mode not in ("power", "full")):
                trial.bad.append(f"{kind}: {facts}")
            if until(kind):
                return True
        return False

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL these."""
        for rank in ranks:
            self.processes[rank].kill()

    def gone(self, patience: float) -> bool:
        """Whether all end by themselves in time; those that do not are killed."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        ended = all(process.exitcode is not None for process in self.processes)
        self.kill(list(range(len(self.processes))))
        for process in self.processes:
            process.join()
        return ended


def chain(root: Path, seed: int, kills: int, damages: float = 0.0) -> list[Trial]:
    """Kill `kills` starts of the ranks over one folder, and let a last one end by itself.

    Args:
        damages: how often something on the disk is spoilt between two starts, as a share.
    """
    draw, known, damaged, trials = random.Random(seed), 0, 0, []
    for number in range(kills + 1):
        mode = draw.choice(MODES) if number < kills else "ends"
        trial, life = drawn(root, draw, mode, known, seed)
        ranks = Ranks(life)
        if not ranks.hear(trial, lambda kind: kind == "restored", PATIENCE):
            trial.bad.append("did not start")
        elif mode == "ends":
            let_end(ranks, trial)
        else:
            strike(ranks, trial, life, draw)
        ranks.gone(0.0)
        ranks.hear(trial, lambda kind: False, PATIENCE)  # what it told before it was killed
        judge(trial, known, damaged, root)
        known, damaged = trial.known, 0
        trials.append(trial)
        if draw.random() < damages and number < kills:
            damaged, known = spoilt(root, draw)
    return trials


def let_end(ranks: Ranks, trial: Trial) -> None:
    """Wait for a start that nobody disturbs."""
    if not ranks.hear(trial, lambda kind: kind == "ended", PATIENCE) or not ranks.gone(PATIENCE):
        trial.bad.append("did not end")


def drawn(root: Path, draw: random.Random, mode: str, known: int, seed: int) -> tuple[Trial, Life]:
    """A start and what its ranks do."""
    background = draw.random() < 0.75 or mode == "writer"
    overlap = "skip" if draw.random() < 0.3 else "wait"
    wish = Checkpoint(asynchronous=background, overlap=overlap, keep=draw.randint(1, 3), keep_every=draw.choice((0, 5)))  # type: ignore[arg-type]
    world = draw.choice(WORLDS[1:] if mode == "one" else WORLDS)
    steps = 4 if mode == "ends" else 400
    life = Life(root, world, free_port(), wish, steps, again=draw.random() < 0.3)
    return Trial(seed, mode, world, background, known), life


def strike(ranks: Ranks, trial: Trial, life: Life, draw: random.Random) -> None:
    """End a start by SIGKILL, at a random moment."""
    every = list(range(life.world))
    victim = draw.choice(every)
    ranks.hear(trial, lambda kind: False, draw.uniform(0.0, 0.5))
    if trial.mode == "writer":
        deadline = time.monotonic() + PATIENCE
        while not list(life.root.glob(f"step-*.partial/rank-{victim:05d}.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 0.02))
    if trial.mode == "all":
        ranks.kill(draw.sample(every, len(every)))
    else:
        ranks.kill([victim])
        if not ranks.gone(PATIENCE):
            trial.bad.append("the other ranks did not end")


def judge(trial: Trial, known: int, damaged: int, root: Path) -> None:
    """What is wrong with a start that has ended.

    Args:
        known: the newest step that was on disk and whole when it began.
        damaged: the step of a checkpoint that was spoilt before; 0: none was.
    """
    folders = retention.found(root)
    unfinished = [path for path in folders if not (path / "COMPLETE").exists()]
    trial.inside = bool(unfinished or list(root.glob("step-*.partial")) or list(root.glob("step-*.replaced")))
    if 0 <= trial.restored < known:
        trial.bad.append(f"went on from step {trial.restored}, {known} was on disk")
    if damaged and trial.restored == damaged:
        trial.bad.append(f"went on from step {damaged}, which is damaged")


def spoilt(root: Path, draw: random.Random) -> tuple[int, int]:
    """Damage one file of the newest complete checkpoint; returns its step, and that of the next one, which is whole."""
    complete = [path for path in retention.found(root) if (path / "COMPLETE").exists()]
    if not complete:
        return 0, 0
    damage(draw.choice(sorted(complete[0].iterdir())), draw)
    steps = [retention.step_of(path) for path in complete]
    return steps[0], steps[1] if len(steps) > 1 else 0


def damage(file: Path, draw: random.Random) -> str:
    """Spoil a file: flip a bit, cut it, take a block away, overwrite a block, append; returns what was done."""
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    what = draw.choice(("flip", "flip", "cut", "hole", "block", "tail", "gone"))
    block = min(512, len(content) - place)
    if what == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif what == "cut":
        del content[place:]
    elif what == "hole":
        del content[place : place + block]
    elif what == "block":
        content[place : place + block] = bytes(byte ^ 0x5A for byte in content[place : place + block])
    elif what == "tail":
        content += b"\0"
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(content)
    return what
