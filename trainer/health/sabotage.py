"""Faults inside a rank, made on purpose, for `coatnet drill` and the tests. No other run goes through this file.

    python -m trainer.health.sabotage HARM train RECIPE [--field value ...]     `coatnet train`, each of whose ranks is
    python -m trainer.health.sabotage HARM runs/NAME/run.json                   one of these

HARM is JSON, the fields of `Harm`. What is put in is bound to places in the data, so that it comes again with the same
samples, or to steps of one rank. Each rank notes in `sabotage/rank-00000.jsonl` of the run's folder what it did when,
and which samples each finished step trained on.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from configs import resolve
from configs.schema import Run
from data_pipeline import augment
from data_pipeline.stream import Batch
from models.coatnet import CoAtNet
from trainer import cli, launch, train
from trainer import step as step_file
from trainer.engine.engine import Engine
from trainer.engine.loss import Loss, loss_function
from trainer.health import evidence
from trainer.health.guard import Guard
from trainer.step import StepResult, train_step
from trainer.tracking.track import run_folder

NOTES = "sabotage"  # folder in the run's
TIMES = 20.0  # targets that are too large are so many times
EXPLODED = 1e4  # times that a gradient is too large
SECONDS = 0.2  # of a core that a slow rank needs beside its step; that late data come later

EVERY = -1  # rank
At = tuple[int, ...]  # (rank, first step[, last step]), the first time that these are made; (): never


@dataclass(frozen=True)
class Harm:
    """What is wrong in one run, and where.

    Attributes:
        nan_at: global indices of samples whose picture is NaN.
        scaled: global indices [first, last) of samples whose targets are `TIMES` as large.
        left_out: steps whose update is held back.
        skipped: numbers [first, last) of batches that the run leaves out from the start.
        flip: a BatchNorm statistic of the rank changes.
        nan_loss: the loss is NaN, but its gradient is as ever.
        nan_gradient: the gradient of the output of `block` is NaN.
        exploding: that gradient is `EXPLODED` times as large.
        slow: the rank computes longer.
        late: its data come later.
        block: of the network, by name.
    """

    nan_at: tuple[int, ...] = ()
    scaled: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    flip: At = ()
    nan_loss: At = ()
    nan_gradient: At = ()
    exploding: At = ()
    slow: At = ()
    late: At = ()
    block: str = "blocks.s2.0"

    @staticmethod
    def of(given: dict[str, Any]) -> "Harm":
        """From what JSON gives."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return Harm(**values)


class Saboteur:
    """Does the harm in one rank, in place of functions of the same names.

    Attributes:
        seen: global indices of the samples of each step, as it was last made.
    """

    def __init__(self, harm: Harm, rank: int, notes: Path | None = None) -> None:
        """Nothing is wrong yet.

        Args:
            notes: the file to note in; None: none.
        """
        self.harm, self._rank, self._notes = harm, rank, notes
        self.seen: dict[int, list[int]] = {}
        self._done: set[str] = set()  # in the step under way
        self._prepare, self._targets = augment.prepare, augment.targets
        if notes is not None:
            notes.parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While this lasts, runs of this process are harmed."""
        with contextlib.ExitStack() as stack:
            for where, name in ((augment, "prepare"), (augment, "targets"), (train, "train_step"), (train, "Guard")):
                stack.enter_context(_replaced(where, name, getattr(self, name.lower())))
            yield

    def prepare(self, batch: Batch, *rest: Any) -> Tensor:
        """`augment.prepare`."""
        images = self._prepare(batch, *rest)
        bad_B = torch.isin(batch.indices_B, torch.tensor(self.harm.nan_at, dtype=torch.int64, device=images.device))
        if bad_B.any():
            self._done.add("nan_at")
            images[bad_B] = torch.nan
        return images

    def targets(self, batch: Batch, *rest: Any) -> Tensor:
        """`augment.targets`."""
        wanted = self._targets(batch, *rest)
        first, last = self.harm.scaled or (0, 0)
        bad_B = (first <= batch.indices_B) & (batch.indices_B < last)
        if bad_B.any():
            self._done.add("scaled")
            wanted[bad_B] *= TIMES
        return wanted

    def guard(self, run: Run, engine: Engine) -> Guard:
        """`Guard`."""
        made = Guard(run, engine)
        if self.harm.skipped:
            made.skipped.add(*self.harm.skipped)
        return made

    def train_step(
        self, engine: Engine, batches: Iterator[Batch], run: Run, classes: int, rate: float, step: int, limit: float
    ) -> StepResult:
        """`train_step`."""
        began, self._done = time.time(), set()
        if self._hits("flip", step):
            next(iter(evidence.replicated(engine)[1].values()))[0] += 1e-3
        if self._hits("late", step):
            batches = map(_later, batches)
        if step in self.harm.left_out:
            limit = -1.0
        with contextlib.ExitStack() as stack:
            if self._hits("nan_loss", step):
                stack.enter_context(_replaced(step_file, "loss_function", _lost))
            assert isinstance(engine.model, CoAtNet)
            block = dict(engine.model.flat).get(self.harm.block)  # None on the other stages of a pipeline
            for name, factor in (("nan_gradient", torch.nan), ("exploding", EXPLODED)):
                if self._hits(name, step) and block is not None:
                    stack.callback(block.register_forward_hook(partial(_scale, factor)).remove)
            if self._hits("slow", step):
                module = evidence.timed(engine.model, run.parallel.compile)[0]
                burn = partial(_burn, engine.member.device)
                stack.callback(module.register_forward_pre_hook(burn).remove)
            result = train_step(engine, batches, run, classes, rate, step, limit)
        self._note(step, began, result.batches)
        return result

    def _hits(self, name: str, step: int) -> bool:
        """Whether a harm that is bound to a rank and steps is due; not again when a step is made again."""
        rank, first, last = (*(getattr(self.harm, name) or (0, 0, -1)), 0)[:3]
        hit = rank in (self._rank, EVERY) and first <= step <= max(first, last) and step not in self.seen
        self._done |= {name} if hit else set()
        return hit

    def _note(self, step: int, began: float, batches: list[Batch]) -> None:
        """A step is finished."""
        self.seen[step] = [index for batch in batches for index in batch.indices_B.tolist()]
        if self._notes is None:
            return
        samples = list(zip(self.seen[step], (key for batch in batches for key in batch.keys), strict=False))
        line = {"time": began, "step": step, "harm": sorted(self._done), "samples": samples}
        with self._notes.open("a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def _replaced(where: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Something else under a name."""
    own = getattr(where, name)
    setattr(where, name, stand_in)
    try:
        yield
    finally:
        setattr(where, name, own)


def _later(batch: Batch) -> Batch:
    """A batch that comes late."""
    time.sleep(SECONDS)
    return batch


def _lost(kind: Any) -> Loss:
    """`loss_function`."""
    loss_of = loss_function(kind)
    return lambda logits, targets: loss_of(logits, targets) + torch.nan


def _scale(factor: float, module: Any, inputs: Any, output: Any) -> None:
    """Behind a block: its output's gradient is so many times as large."""
    if output.requires_grad:  # not where recomputation only looks ahead
        output.register_hook(lambda gradient: gradient * factor)


def _burn(device: torch.device, module: Any, inputs: Any) -> None:
    """Before what is timed, behind the mark that it begins: keep the device busy."""
    if device.type == "cuda":
        busy: Any = torch.cuda._sleep
        busy(int(SECONDS * 1.5e9))  # in cycles of a clock of about 1.5 GHz
        return
    until = time.thread_time() + SECONDS
    while time.thread_time() < until:
        torch.ones(64).sum()


def command(harm: str, words: list[str]) -> int:
    """`coatnet WORDS`, whose ranks are harmed; its exit code."""
    start = launch.LocalStep

    def harmed(arguments: list[str], *others: Any) -> launch.LocalStep:
        """`launch.LocalStep`, of other ranks."""
        assert arguments[0] == "trainer.train", arguments
        return start(["trainer.health.sabotage", harm, *arguments[1:]], *others)

    with _replaced(launch, "LocalStep", harmed):
        return cli.main(words)


def rank(harm: str, path: str) -> NoReturn:
    """One rank of the run that a run.json describes; ends the process."""
    number = int(os.environ["RANK"])
    notes = run_folder(resolve.recorded(Path(path))) / NOTES / f"rank-{number:05d}.jsonl"
    with Saboteur(Harm.of(json.loads(harm)), number, notes).at_work():
        train.main([path])


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(*sys.argv[1:])
    sys.exit(command(sys.argv[1], sys.argv[2:]))
