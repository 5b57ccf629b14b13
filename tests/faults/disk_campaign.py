"""Chains of starts, as in `checkpoint_campaign`, on disks that lose their power or have no room left."""

import random
import time
from dataclasses import replace
from pathlib import Path

from configs.schema import Checkpoint
from tests.faults.checkpoint_campaign import PATIENCE, Ranks, Trial, drawn, judge, let_end
from tests.faults.disks import disk, small, stuff
from tests.faults.save_rank import Life
from trainer.launch import free_port
from trainer.state import checkpoint, retention


def power_chain(folder: Path, seed: int, cuts: int, forced: bool = True) -> list[Trial]:
    """Cut the power of `cuts` starts of the ranks over one disk, and let a last one end by itself.

    Args:
        forced: see `Life`.
    """
    draw, known, trials = random.Random(seed), 0, []
    with disk(folder) as power:
        root = power.path / "checkpoints"
        for number in range(cuts + 1):
            mode = "power" if number < cuts else "ends"
            trial, life = drawn(root, draw, mode, known, seed)
            ranks = Ranks(replace(life, forced=forced))
            if not ranks.hear(trial, lambda kind: kind == "restored", PATIENCE):
                trial.bad.append("did not start")
            elif mode == "ends":
                let_end(ranks, trial)
            else:
                ranks.hear(trial, lambda kind: False, draw.uniform(0.0, 0.7))
                power.cut()
            ranks.gone(0.0)
            ranks.hear(trial, lambda kind: False, PATIENCE)
            power.unmount()
            power.mount()
            judge(trial, known, 0, root)
            # Where nothing is forced the last known step may be gone: the next start must not be blamed for this one.
            known = (
                trial.known if forced else max([retention.step_of(path) for path in retention.found(root)], default=0)
            )
            if not forced and known < trial.known:
                trial.bad.append(f"{trial.known} was said to be saved, {known} is there")
            trials.append(trial)
    return trials


def full_chain(folder: Path, seed: int) -> list[Trial]:
    """Fill the disk under ranks that save, free it, let them end; start others."""
    draw = random.Random(seed)
    trial = Trial(seed, "full", draw.choice((1, 2, 3)), True, 0)
    with small(folder, 24):  # a checkpoint takes 4.7 MB, and two stay
        root = folder / "checkpoints"
        life = Life(root, trial.world, free_port(), Checkpoint(keep=2), 60, again=False)
        ranks = Ranks(life)
        ranks.hear(trial, lambda kind: trial.saves >= 3, PATIENCE)
        time.sleep(draw.uniform(0.0, 0.2))
        deadline = time.monotonic() + PATIENCE
        ballast = stuff(folder)
        # A save that was nearly written makes room for the next one: it takes an old checkpoint away.
        while not ranks.hear(trial, lambda kind: trial.failed >= 3, 0.2) and time.monotonic() < deadline:
            stuff(folder)
        if trial.failed < 3:
            trial.bad.append("saves do not fail on a full disk")
        whole = [retention.step_of(path) for path in retention.found(root) if not checkpoint.damage(path)]
        if max(whole, default=0) < trial.known:
            trial.bad.append(f"{trial.known} was saved, {whole} are whole on the full disk")
        ballast.unlink()
        let_end(ranks, trial)
        left = [path.name for path in root.iterdir() if path.suffix]
        if left or trial.known != life.steps:
            trial.bad.append(f"left behind {left}, the last save is {trial.known} of {life.steps}")
        judge(trial, 0, 0, root)
        after, life = drawn(root, draw, "ends", trial.known, seed)
        ranks = Ranks(life)
        let_end(ranks, after)
        judge(after, trial.known, 0, root)
    return [trial, after]
