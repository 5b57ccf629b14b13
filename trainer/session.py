"""A run in progress on one rank: its parts, its place in the schedule, and what is written down about it."""

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import resolve
from configs.schema import Run
from data_pipeline import damage
from data_pipeline.manifest import Dataset, Split
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.reader import Part
from data_pipeline.stream import heldout_loader
from models import cost, spec
from trainer.cluster import Member
from trainer.cost.ledger import Ledger
from trainer.engine.engine import Engine
from trainer.evaluation.evaluate import describe, evaluate
from trainer.evaluation.examples import Examples
from trainer.health import goodput
from trainer.health.goodput import Book, Clock
from trainer.health.guard import Guard
from trainer.health.pulse import Pulse
from trainer.health.stopping import StopFlag
from trainer.machine import environment
from trainer.state import retention
from trainer.state.saver import Saver
from trainer.tracking.meter import Meter
from trainer.tracking.progress import ProgressLine
from trainer.tracking.track import RunLog


def part_of(member: Member) -> Part:
    """What this rank's stage needs of a batch: the first one the pictures, the last one the labels."""
    return "all" if member.begins else "labels" if member.ends else "seeds"


@dataclass
class Session:
    """What the loop needs, put together once by `trainer.train.prepare`.

    Attributes:
        log: the first rank's, None elsewhere.
        steps: of the whole schedule.
        end: where this run stops: `steps`, but for a check with `--steps`.
        step: updates made.
        clock: of its wall time, by class.
        pulse: of its signs of life.
        saved: step of the last checkpoint that is on disk, or that it began from.
        latest: the figures of the last log line.
        saver: of its checkpoints.
        guard: of its health, and of which batches of data it takes.
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
    clock: Clock
    pulse: Pulse
    guard: Guard
    latest: dict[str, float] = field(default_factory=dict)
    saver: Saver = field(init=False)
    saved: int = field(init=False)

    def __post_init__(self) -> None:
        wish = self.run.checkpoint
        # A trace holds what the step's threads do in their order, into which a writer's would fall anywhere.
        background = wish.asynchronous and not self.run.parallel.trace and not self.run.data.synthetic
        background &= self.run.parallel.offload != "nvme"  # memory has no room for what lies on a disk
        self.saver = Saver(self.folder / "checkpoints", wish, self.member, background, self.run.guard.reach)
        self.saver.interval.begin(self.step)
        self.saved = self.step
        self.engine.before_change = self._settle

    def _settle(self) -> None:
        """Let no save see what comes next."""
        if self.saver.copying:
            with self.clock.of("save"):
                self.saver.settle()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many updates, and at the end, is due."""
        return self.step == self.end or (every > 0 and self.step % every == 0)

    @property
    def consumed(self) -> int:
        """The data's cursor: global index of the first sample of the next update."""
        return self.guard.skipped.batch(self.step) * self.run.data.global_batch

    def event(self, kind: str, **facts: Any) -> None:
        """Write an event, on the first rank."""
        if self.log is not None:
            self.log.event(kind, step=self.step, **facts)

    def trained(self, images: int) -> None:
        """So many images more; the clock's next line has them, so that a crash then knows what it lost."""
        self.ledger.images += images
        self.clock.ledger["images"] = self.ledger.images

    def count_time(self) -> Book:
        """Bring the ledger's device time and energy up to now; returns the sums of wall time."""
        book = self.clock.now()
        self.ledger.held(book)
        self.ledger.measured(*self.meter.used)
        self.clock.ledger = self.ledger.state()
        return book

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Time and images go on from a checkpoint's state, or from nothing: what was done since then is lost."""
        self.clock.go_on(state.get("goodput") if state else None)
        self.ledger.go_on(state["ledger"] if state else None, self.clock.ledger, self.clock.held)
        self.count_time()

    def log_line(self, rate: float, grad_norm: float) -> None:
        """Write the interval's figures everywhere."""
        values = self.meter.metrics()
        values |= goodput.metrics(self.count_time()) | {"train/lr": rate, **self.ledger.metrics()}
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

    def save_due(self, scoring: bool) -> bool:
        """Whether a save is due; so it is where a rule wants one kept, at a step or beside an evaluation."""
        wish = self.run.checkpoint
        kept = (wish.keep_every > 0 and self.step % wish.keep_every == 0) or (scoring and bool(wish.keep_best))
        return self.step == self.end or self.saver.interval.due(self.step) or kept

    def warn_of_low_disk(self) -> None:
        """Say before the first save whether the disk has room for those to come; on the first rank."""
        run, root = self.run, self.saver.root
        size = cost.count(spec.of(run.model), run.model.resolution, classes=self.dataset.classes).parameters
        size *= 4 * (4 if run.optim.ema else 3)  # fp32: value, AdamW's two moments, average
        text = "" if run.data.synthetic else retention.forecast(root, size, retention.coming(root, run.checkpoint))
        if text:
            self.line.say(text)
            self.event("warning", of="save", text=text)

    @property
    def save_seconds(self) -> float | None:
        """Seconds until the last save was on disk, None before the first."""
        return self.saver.interval.stall + self.saver.interval.write or None

    def save(self, last: bool = False) -> None:
        """Save a checkpoint, all ranks together; what comes of it is told here or by a later `tell_saves`.

        Args:
            last: nothing follows, so that it must succeed. So it is at the end of the run too.

        Raises:
            SaveError: the last save could not be written; any other only is told.
        """
        interval = self.saver.interval
        interval.end(self.step)
        before, engine = interval.steps, self.engine
        parts, last = engine.fragments(owned=True), last or self.step == self.end
        try:
            with self.clock.of("save"):
                self.saver.save(self.step, self.state(), parts, engine.buffers(), last)
        finally:
            self.tell_saves()
        if interval.steps != before:
            self.event("interval", steps=interval.steps, stall=interval.stall, write=interval.write)
            self.line.say(
                f"saves every {interval.steps} steps from now on (each stops training {interval.stall:.2f} s)"
            )
        interval.begin(self.step)
        self.meter.restart()

    def state(self) -> dict[str, Any]:
        """The small state of a checkpoint. Every random choice of a run is a function of its seed and a position."""
        self.count_time()
        return {
            "step": self.step,
            "updates": self.engine.updates,
            "order": self.order.state(self.consumed, self.split.fingerprint),
            "schedule": {"steps": self.steps, "warmup": self.warmup},
            "rng": {"seed": self.run.seed, "by": "position"},
            "guard": self.guard.state(),
            "meters": self.latest,  # a save ends the interval of the figures: no sums are under way
            "ledger": self.ledger.state(),
            "goodput": self.clock.state(),
            "config": resolve.digest(self.run),
            "run": json.loads(resolve.to_json(self.run)),
            "vocabulary": list(self.dataset.vocabulary),
            "world": self.member.world,
            "versions": environment.versions(),
        }

    def tell_saves(self, wait: bool = False) -> None:
        """Write down what became of the saves that ended since the last call, or with `wait` of all."""
        with self.clock.of("save"):
            outcomes = self.saver.finished(wait)
        for outcome in outcomes:
            self.saved = self.saved if outcome.problem else outcome.step
            if not self.member.first:
                continue
            for note in outcome.notes:
                self.line.say(note)
                self.event("warning", of="save", text=note)
            if outcome.problem:
                self.line.say(f"NOT SAVED at step {outcome.step}: {outcome.problem}")
                self.event("save_failed", of_step=outcome.step, reason=outcome.problem)
            else:
                facts = {name: getattr(outcome, name) for name in ("stall", "write", "bytes")}
                self.event("save", of_step=outcome.step, seconds=outcome.stall, **facts)

    def rescue_save(self) -> None:
        """Let a save under way get to the disk before an error ends the run."""
        with contextlib.suppress(RuntimeError):  # another rank is gone: that save is lost, older ones are not
            self.tell_saves(wait=True)

    def score(self, stop: StopFlag, final: bool = False) -> bool:
        """Evaluate the raw and the averaged weights on the held-out split and write the scores down.

        Returns:
            Whether it came to its end: a request to stop breaks it off, and nothing is written.
        """
        examples = Examples(self.run, self.dataset.classes) if final else None
        with self.clock.of("evaluation"):
            average = self.engine.average is not None
            found = self._held_out(stop, None if average else examples)
            scores = {f"eval/{name}": value for name, value in found.items()}
            if average and not stop.stopping:
                with self.engine.averaged():
                    found = self._held_out(stop, examples)
                    scores |= {f"eval_ema/{name}": value for name, value in found.items()}
        if stop.stopping:
            self.line.say("asked to stop: this evaluation is not finished")
            return False
        if examples is not None:
            examples.write(self.folder, self.step, self.member)
        self.event("evaluation", **scores)
        if self.member.first and self.saver.root.exists():
            problem = retention.write_score(self.saver.root, self.step, scores)
            if problem:
                self.line.say(problem)
                self.event("warning", of="score", text=problem)
        if self.log is not None:
            self.log.metrics(self.step, scores)
            self.line.say(describe(scores))
            if final:
                (self.folder / "evaluation.json").write_text(json.dumps({"step": self.step, **scores}, indent=2))
        self.meter.restart()
        return True

    def _held_out(self, stop: StopFlag, examples: Examples | None) -> dict[str, float]:
        """Scores of the model as it stands, by name. A collective call."""
        replica, replicas, part = self.member.replica, self.member.replicas, part_of(self.member)
        batches = heldout_loader(self.dataset, "heldout", self.run, replica, replicas, part)
        watched = self.pulse.over(stop.until(batches, self.member))
        with self.engine.evaluation() as forward:
            return evaluate(forward, watched, self.run, self.dataset, self.member, examples)

    def speed(self) -> str:
        """What a check of a machine wants to know."""
        values = self.latest
        mfu = f", MFU {values['perf/mfu']:.1%}" if "perf/mfu" in values else ""
        return (
            f"{values['perf/images_per_second']:.1f} images/s, {values['perf/images_per_second_per_device']:.1f} per "
            f"device{mfu}; peak memory {values['memory/peak_bytes'] / 1e9:.2f} GB on this rank; "
            f"{values['data/wait_fraction']:.1%} of the time waiting for data"
        )
