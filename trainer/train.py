"""The road of a run, in the order it is walked.

One process per device runs this; `trainer/launch.py` starts them as `python -m trainer.train runs/NAME/run.json`.
"""

import json
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from data_pipeline.manifest import Dataset, Split, open_dataset
from data_pipeline.order import Order
from data_pipeline.stream import heldout_loader, train_loader
from models import cost
from models import spec as specs
from trainer import checkpoint, cluster, environment, network
from trainer.engine import Engine
from trainer.evaluate import evaluate
from trainer.ledger import Ledger
from trainer.meter import Meter
from trainer.optim import learning_rate
from trainer.plan import Layout, layout
from trainer.progress import ProgressLine
from trainer.step import train_step
from trainer.stopping import StopFlag
from trainer.track import MlflowProcess, RunLog, run_folder

DONE, STOPPED, INPUT_ERROR, DIVERGED = 0, 75, 76, 77


@dataclass
class Session:
    """What the loop needs, put together once by `prepare`."""

    run: Run
    folder: Path
    member: cluster.Member
    dataset: Dataset
    split: Split
    order: Order
    engine: Engine
    ledger: Ledger
    meter: Meter
    log: RunLog | None  # the first rank's
    line: ProgressLine
    steps: int
    warmup: int
    step: int  # updates made
    held_since: float  # when the ledger last counted device time

    def event(self, kind: str, **facts: Any) -> None:
        """Write an event, on the first rank."""
        if self.log is not None:
            self.log.event(kind, step=self.step, **facts)


def train(run: Run, stop: StopFlag) -> int:
    """Train `run` on this rank, from its newest verified checkpoint if it has one.

    Returns:
        The exit code of DESIGN.md: done, stopped on request and saved, or diverged.
    """
    began = time.perf_counter()
    member = cluster.join(run)
    session = prepare(run, member, began)
    try:
        code = loop(session, stop)
        if code == DONE:
            finish(session)
    finally:
        session.line.close()
    close(session)
    return code


def prepare(run: Run, member: cluster.Member, began: float) -> Session:
    """Resolve the data, find where to go on, build the network and its engine, restore or initialise."""
    folder = run_folder(run)
    dataset = open_dataset(run.data.path)
    split = dataset.split("train")
    plan = layout(run, member.world)
    steps, warmup = resolve.total_steps(run, split.samples), resolve.warmup(run, split.samples)
    line = ProgressLine(folder.name, steps, shown=member.first)
    saved = checkpoint.newest(folder / "checkpoints", member, line.say)
    order = open_order(run, split, saved)

    engine = Engine(
        network.in_layout(run, dataset.classes, plan, member, network.head_bias(run, dataset)), run, plan, member
    )
    step = 0
    if saved is not None:
        step = saved.step
        checkpoint.restore(saved, engine.fragments(owned=False), engine.buffers())
        engine.restored(step)

    multiply_adds = cost.count(
        specs.get(run.model.name), run.model.resolution, run.model.stride, dataset.classes
    ).multiply_adds
    ledger = Ledger(multiply_adds, member.peak)
    if saved is not None:
        ledger.resume(saved.state["ledger"])
    meter = Meter(member, multiply_adds, run.data.global_batch)
    log = RunLog(folder) if member.first else None
    line.start(step)
    session = Session(run, folder, member, dataset, split, order, engine, ledger, meter, log, line, steps, warmup,
                      step, began)  # fmt: skip
    announce(session, plan)
    return session


def open_order(run: Run, split: Split, saved: checkpoint.Saved | None) -> Order:
    """The order of samples: the saved one where a checkpoint is continued, else the recipe's."""
    if saved is not None:
        order, consumed = Order.resume(saved.state["order"], split.counts, split.fingerprint)
        if consumed != saved.step * run.data.global_batch:
            raise InputError(
                f"{saved.path}: {consumed} samples in {saved.step} steps is not data.global_batch = "
                f"{run.data.global_batch}; take the batch the run began with"
            )
        return order
    return Order(split.counts, seed=run.seed, block=run.data.global_batch, lanes=run.data.lanes, piece=run.data.piece)


def announce(session: Session, plan: Layout) -> None:
    """Write down and say what is about to run, on the first rank."""
    run, member, kind = session.run, session.member, "resume" if session.step else "start"
    if not member.first:
        return
    session.engine.write_config(session.folder)
    (session.folder / "environment.json").write_text(json.dumps(environment.facts(member.device_name), indent=2))
    session.event(kind, world=member.world, device=member.device_name, config=resolve.digest(run))
    parameters = sum(fragment.value.numel() for fragment in session.engine.fragments(owned=True))
    session.line.say(
        f"{kind} {session.folder} at step {session.step} of {session.steps}: {run.model.name} at "
        f"{run.model.resolution} px, {session.dataset.classes} classes, {session.split.samples:,} images\n"
        f"{member.world} x {member.device_name}, ZeRO-{run.parallel.zero}, recompute {run.parallel.recompute}, "
        f"{run.precision.dtype}; global batch {plan.global_batch} = {member.world} ranks x {plan.accumulation} x "
        f"{plan.micro_batch}, BatchNorm over {plan.replica_batch}; {parameters:,} parameters on this rank; "
        f"clip {run.optim.clip_norm:g}"
    )


def loop(session: Session, stop: StopFlag) -> int:
    """Steps until the end or a request to stop; logs, saves and evaluates when due."""
    run, member = session.run, session.member
    mlflow = MlflowProcess(run, session.folder) if member.first and run.tracking.mlflow else None
    batches = train_loader(
        session.dataset,
        run,
        session.order,
        session.engine.layout.slices(member.rank),
        start=session.step * run.data.global_batch,
        steps=session.steps - session.step,
    )
    session.meter.restart()
    code = DONE
    while session.step < session.steps:
        rate = learning_rate(run.optim, session.step, session.steps, session.warmup)
        session.step += 1
        result = train_step(session.engine, batches, run, session.dataset.classes, rate, session.step)
        session.ledger.images += run.data.global_batch
        session.meter.step(result.loss, result.waited)
        due = session.step % run.tracking.log_every == 0 or session.step == session.steps
        if due and not log_line(session, rate, float(result.grad_norm)):
            code = DIVERGED
            break
        stopping = stop.agreed(member)
        if stopping or session.step % run.checkpoint.every == 0 or session.step == session.steps:
            save(session)
        if stopping:
            code = STOPPED
            break
        if run.evaluate.every and session.step % run.evaluate.every == 0 and session.step < session.steps:
            score(session)
    stop.finish()
    del batches
    if code == DONE:
        score(session, final=True)
    close_tracking(session, mlflow, code)
    return code


def log_line(session: Session, rate: float, grad_norm: float) -> bool:
    """Write the interval's figures everywhere; false when the loss or the gradient is not a number."""
    count_device_time(session)
    values = session.meter.metrics()
    values |= {"train/lr": rate, "train/grad_norm": grad_norm, **session.ledger.metrics()}
    session.meter.restart()
    healthy = bool(torch.isfinite(torch.tensor([values["train/loss"], grad_norm])).all())
    if session.log is not None:
        session.log.metrics(session.step, values)
        session.line.show(session.step, values)
    if not healthy:
        session.event("diverged", loss=str(values["train/loss"]), grad_norm=str(grad_norm))
        session.line.say(
            f"diverged at or before step {session.step}: loss {values['train/loss']}, gradient norm {grad_norm}. "
            f"Nothing was saved since; lower optim.lr or raise the warm-up and start from {session.folder}/checkpoints"
        )
    return healthy


def count_device_time(session: Session) -> None:
    """Add the time since the last call to the ledger, times the number of devices."""
    now = time.perf_counter()
    session.ledger.device_seconds += session.member.world * (now - session.held_since)
    session.held_since = now


def save(session: Session) -> None:
    """Save a checkpoint, all ranks together, and delete those no longer kept."""
    count_device_time(session)
    began = time.perf_counter()
    run = session.run
    state = {
        "step": session.step,
        "order": session.order.state(session.step * run.data.global_batch, session.split.fingerprint),
        "ledger": session.ledger.state(),
        "config": resolve.digest(run),
        "run": json.loads(resolve.to_json(run)),
        "classes": session.dataset.classes,
        "vocabulary": list(session.dataset.vocabulary),
        "world": session.member.world,
        "versions": environment.versions(),
    }
    root = session.folder / "checkpoints"
    engine = session.engine
    checkpoint.save(root, session.step, state, engine.fragments(owned=True), engine.buffers(), session.member)
    if session.member.first:
        checkpoint.prune(root, run.checkpoint.keep)
        session.event("save", seconds=time.perf_counter() - began)
    session.meter.restart()


def score(session: Session, final: bool = False) -> None:
    """Evaluate on the held-out split and write the scores down."""
    engine = session.engine
    scores = {f"eval/{name}": value for name, value in held_out(session).items()}
    if engine.average is not None:
        with engine.averaged():
            scores |= {f"eval_ema/{name}": value for name, value in held_out(session).items()}
    count_device_time(session)
    session.event("evaluation", **scores)
    if session.log is not None:
        session.log.metrics(session.step, scores)
        session.line.say(describe(scores))
        if final:
            (session.folder / "evaluation.json").write_text(json.dumps({"step": session.step, **scores}, indent=2))
    session.meter.restart()


def held_out(session: Session) -> dict[str, float]:
    """Scores of the model as it stands, by name. A collective call."""
    run, member = session.run, session.member
    batches = heldout_loader(session.dataset, "heldout", run, member.rank, member.world)
    with session.engine.evaluation() as forward:
        return evaluate(forward, batches, run, session.dataset, member)


def describe(scores: dict[str, float]) -> str:
    """Scores for a person, a line for the raw weights and one for the averaged ones."""
    lines = []
    for prefix, weights in (("eval", "raw weights"), ("eval_ema", "averaged weights")):
        if f"{prefix}/top1" in scores:
            ranked = f", mAP {scores[f'{prefix}/map']:.2%}" if f"{prefix}/map" in scores else ""
            lines.append(
                f"held-out top-1 {scores[f'{prefix}/top1']:.2%}, top-5 {scores[f'{prefix}/top5']:.2%}{ranked} on "
                f"{scores[f'{prefix}/samples']:,.0f} images ({weights})"
            )
    return "\n".join(lines)


def close_tracking(session: Session, mlflow: MlflowProcess | None, code: int) -> None:
    """Mark the end in the run folder and wait for MLflow to have it."""
    if session.log is None:
        return
    if code == DONE:
        session.log.metrics(session.step, session.ledger.metrics())
        (session.folder / "done").write_text(f"{session.step}\n")
    session.event({DONE: "done", STOPPED: "stop", DIVERGED: "diverged"}[code])
    problem = mlflow.close() if mlflow is not None else None
    if problem:
        session.line.say(problem)
    if code == STOPPED:
        session.line.say(f"stopped on request at step {session.step}, saved; the same command continues")


def finish(session: Session) -> None:
    """Say what the run was and cost."""
    session.line.say(session.ledger.summary())


def close(session: Session) -> None:
    """Leave together: a rank that exits early would look like a crash to the others."""
    dist.barrier(group=session.member.control)
    if session.log is not None:
        session.log.close()
    cluster.leave()


def main(arguments: list[str]) -> int:
    """Run one rank of the run that `arguments[0]`, a run.json, describes."""
    stop = StopFlag()
    try:
        return train(resolve.from_json(Path(arguments[0]).read_text()), stop)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return INPUT_ERROR
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
