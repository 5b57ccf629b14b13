"""A run in progress on one rank: its parts, its place in the schedule, and what is written down about it."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import resolve
from configs.schema import Run
from data_pipeline import damage
from data_pipeline.manifest import Dataset, Split
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.stream import heldout_loader
from trainer import checkpoint, environment
from trainer.cluster import Member
from trainer.engine import Engine
from trainer.evaluate import describe, evaluate
from trainer.ledger import Ledger
from trainer.meter import Meter
from trainer.progress import ProgressLine
from trainer.track import RunLog

PATIENCE = 5  # steps in a row without a finite gradient until a run counts as diverged


@dataclass
class Session:
    """What the loop needs, put together once by `trainer.train.prepare`.

    Attributes:
        log: the first rank's, None elsewhere.
        steps: of the whole schedule.
        end: where this run stops: `steps`, but for a check with `--steps`.
        step: updates made.
        held_since: when the ledger last counted device time.
        latest: the figures of the last log line.
    """

    run: Run
    folder: Path
    member: Member
    dataset: Dataset
    split: Split
    order: Order | Mixture
    engine: Engine
    ledger: Ledger
    meter: Meter
    log: RunLog | None
    line: ProgressLine
    steps: int
    warmup: int
    end: int
    step: int
    held_since: float
    latest: dict[str, float] = field(default_factory=dict)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many updates, and at the end, is due."""
        return self.step == self.end or (every > 0 and self.step % every == 0)

    def event(self, kind: str, **facts: Any) -> None:
        """Write an event, on the first rank."""
        if self.log is not None:
            self.log.event(kind, step=self.step, **facts)

    def count_device_time(self) -> None:
        """Add the time since the last call to the ledger, times the number of devices."""
        now = time.perf_counter()
        self.ledger.device_seconds += self.member.world * (now - self.held_since)
        self.held_since = now

    def log_line(self, rate: float, grad_norm: float) -> bool:
        """Write the interval's figures everywhere; false when the run has diverged."""
        self.count_device_time()
        values = self.meter.metrics()
        values |= {"train/lr": rate, **self.ledger.metrics()}
        if math.isfinite(grad_norm):
            values["train/grad_norm"] = grad_norm
        self.meter.restart()
        if self.run.data.on_damage == "replace":
            values["data/bad_samples"] = damage.count(self.folder)
            if values["data/bad_samples"] > self.latest.get("data/bad_samples", 0):
                self.event("damage", bad_samples=values["data/bad_samples"])
        self.latest = values
        if self.log is not None:
            self.log.metrics(self.step, values)
            self.line.show(self.step, values)
        bad = self.meter.skipped_in_a_row
        if bad < PATIENCE:
            return True
        self.line.say(
            f"diverged: the gradients of the last {bad} steps up to {self.step} were not finite and their updates "
            f"were left out. Lower optim.lr or lengthen the warm-up, under another --name"
        )
        return False

    def save(self) -> None:
        """Save a checkpoint, all ranks together, and delete those no longer kept."""
        self.count_device_time()
        began = time.perf_counter()
        state = {
            "step": self.step,
            "updates": self.engine.updates,
            "order": self.order.state(self.step * self.run.data.global_batch, self.split.fingerprint),
            "ledger": self.ledger.state(),
            "config": resolve.digest(self.run),
            "run": json.loads(resolve.to_json(self.run)),
            "vocabulary": list(self.dataset.vocabulary),
            "world": self.member.world,
            "versions": environment.versions(),
        }
        root, engine = self.folder / "checkpoints", self.engine
        checkpoint.save(root, self.step, state, engine.fragments(owned=True), engine.buffers(), self.member)
        if self.member.first:
            for problem in checkpoint.prune(root, self.run.checkpoint.keep, self.step):
                self.line.say(problem)
            self.event("save", seconds=time.perf_counter() - began)
        self.meter.restart()

    def score(self, final: bool = False) -> None:
        """Evaluate the raw and the averaged weights on the held-out split and write the scores down."""
        scores = {f"eval/{name}": value for name, value in self._held_out().items()}
        if self.engine.average is not None:
            with self.engine.averaged():
                scores |= {f"eval_ema/{name}": value for name, value in self._held_out().items()}
        self.count_device_time()
        self.event("evaluation", **scores)
        if self.log is not None:
            self.log.metrics(self.step, scores)
            self.line.say(describe(scores))
            if final:
                (self.folder / "evaluation.json").write_text(json.dumps({"step": self.step, **scores}, indent=2))
        self.meter.restart()

    def _held_out(self) -> dict[str, float]:
        """Scores of the model as it stands, by name. A collective call."""
        batches = heldout_loader(self.dataset, "heldout", self.run, self.member.rank, self.member.world)
        with self.engine.evaluation() as forward:
            return evaluate(forward, batches, self.run, self.dataset, self.member)

    def speed(self) -> str:
        """What a check of a machine wants to know."""
        values = self.latest
        mfu = f", MFU {values['perf/mfu']:.1%}" if "perf/mfu" in values else ""
        return (
            f"{values['perf/images_per_second']:.1f} images/s, {values['perf/images_per_second_per_device']:.1f} per "
            f"device{mfu}; peak memory {values['memory/peak_bytes'] / 1e9:.2f} GB on this rank; "
            f"{values['data/wait_fraction']:.1%} of the time waiting for data"
        )
