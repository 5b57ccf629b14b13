"""The road of a run, in the order it is walked.

One process per device runs this; `trainer/launch.py` starts them as `python -m trainer.train runs/NAME/run.json`.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from data_pipeline import mixture
from data_pipeline.manifest import Split
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.stream import open_data, train_loader
from models import attention, cost, spec
from trainer import checkpoint, cluster, environment, network
from trainer.engine import Engine
from trainer.ledger import Ledger
from trainer.meter import Meter
from trainer.optim import learning_rate
from trainer.plan import layout
from trainer.progress import ProgressLine
from trainer.session import Session
from trainer.step import train_step
from trainer.stopping import StopFlag
from trainer.track import CarryProcess, RunLog, run_folder, wanted
from trainer.warm_start import warm_start

DONE, STOPPED, INPUT_ERROR, DIVERGED = 0, 75, 76, 77


def train(run: Run, stop: StopFlag) -> int:
    """Train `run` on this rank, from its newest verified checkpoint if it has one.

    Returns:
        The exit code of DESIGN.md: done, stopped on request and saved, or diverged.
    """
    began = time.perf_counter()
    member = cluster.join(run)
    session = prepare(run, member, began)
    writer = CarryProcess(run, session.folder) if member.first and wanted(run) else None
    try:
        code = loop(session, stop)
        if code == DONE and session.end == session.steps:
            session.score(final=True)
        close(session, writer, code)
    finally:
        session.line.close()
    return code


def prepare(run: Run, member: cluster.Member, began: float) -> Session:
    """Open the data, find where to go on, build the network and its engine, restore or initialise."""
    folder, plan, dataset = run_folder(run), layout(run, member.world), open_data(run)
    split = dataset.split("train")
    steps, warmup = resolve.total_steps(run, split.samples), resolve.warmup(run, split.samples)
    end = min(steps, run.steps or steps)
    line = ProgressLine(folder.name, end, shown=member.first)
    saved = checkpoint.newest(folder / "checkpoints", member, line.say)
    order = open_order(run, split, saved)

    bias = network.head_bias(run, dataset)
    model = network.in_layout(run, dataset.classes, plan, member, bias)
    began_from = warm_start(run, dataset, model, member) if saved is None and run.init.path else {}
    engine = Engine(model, run, plan, member)
    counts = cost.count(spec.of(run.model), run.model.resolution, classes=dataset.classes)
    ledger = Ledger(counts.multiply_adds, member.peak)
    step = 0
    if saved is not None:
        step = saved.step
        checkpoint.restore(saved, engine.fragments(owned=False), engine.buffers())
        engine.restored(int(saved.state["updates"]))
        ledger.resume(saved.state["ledger"])

    session = Session(
        run=run, folder=folder, member=member, dataset=dataset, split=split, order=order, engine=engine, ledger=ledger,
        meter=Meter(member, counts.multiply_adds, run.data.global_batch), log=RunLog(folder) if member.first else None,
        line=line, steps=steps, warmup=warmup, end=end, step=step, held_since=began,
    )  # fmt: skip
    announce(session)
    if began_from:
        session.event("init", **began_from)
        line.say(f"starts from the {began_from['weights']} weights of {run.init.path}, step {began_from['of_step']}")
    return session


def open_order(run: Run, split: Split, saved: checkpoint.Saved | None) -> Order | Mixture:
    """The order of samples: the saved one where a checkpoint is continued, else the recipe's."""
    if saved is None:
        return mixture.begin(run, split)
    order, consumed = mixture.resume(saved.state["order"], split)
    if consumed != saved.step * run.data.global_batch:
        raise InputError(
            f"{saved.path}: {consumed} samples in {saved.step} steps is not data.global_batch = "
            f"{run.data.global_batch}; take the batch the run began with"
        )
    return order


def announce(session: Session) -> None:
    """Write down and say what is about to run, on the first rank."""
    run, member, plan = session.run, session.member, session.engine.layout
    session.line.start(session.step)
    if not member.first:
        return
    kind = "resume" if session.step else "start"
    session.engine.write_config(session.folder)
    (session.folder / "environment.json").write_text(json.dumps(environment.facts(member.device_name), indent=2))
    session.event(
        kind,
        world=member.world,
        device=member.device_name,
        config=resolve.digest(run),
        attention=attention.resolve(run.model.attention, member.device),
    )
    parameters = sum(fragment.value.numel() for fragment in session.engine.fragments(owned=True))
    session.line.say(
        f"{kind} {session.folder} at step {session.step} of {session.end}: {run.model.name} at "
        f"{run.model.resolution} px, {session.dataset.classes} classes, {session.split.samples:,} images\n"
        f"{member.world} x {member.device_name}, ZeRO-{run.parallel.zero}, recompute {run.parallel.recompute}, "
        f"{run.precision.dtype}; global batch {plan.global_batch} = {member.world} ranks x {plan.accumulation} x "
        f"{plan.micro_batch}, BatchNorm over {plan.replica_batch}; {parameters:,} parameters on this rank; "
        f"clip {run.optim.clip_norm:g}; attention {attention.resolve(run.model.attention, member.device)}"
    )


def loop(session: Session, stop: StopFlag) -> int:
    """Steps until the end or a request to stop; logs, saves and evaluates when due."""
    run, start = session.run, session.step
    batches = train_loader(
        session.dataset,
        run,
        session.order,
        session.engine.layout.slices(session.member.rank),
        start=start * run.data.global_batch,
        steps=session.end - start,
    )
    session.meter.restart()
    code = DONE
    while session.step < session.end:
        rate = learning_rate(run.optim, session.step, session.steps, session.warmup)
        session.step += 1
        result = train_step(session.engine, batches, run, session.dataset.classes, rate, session.step)
        session.ledger.images += run.data.global_batch
        session.meter.step(result.loss, result.healthy, result.waited)
        stopping = stop.agreed(session.member)
        saving = (stopping or session.due(run.checkpoint.every)) and not run.data.synthetic
        scoring = session.step < session.end and run.evaluate.every > 0 and session.due(run.evaluate.every)
        # A save or an evaluation ends the interval of the figures, and no diverged state is saved.
        logging = saving or scoring or session.due(run.tracking.log_every)
        if logging and not session.log_line(rate, float(result.grad_norm)):
            code = DIVERGED
            break
        if saving:
            session.save()
        if scoring:
            session.score()
        if stopping:
            code = STOPPED
            break
    stop.finish()
    return code


def close(session: Session, writer: CarryProcess | None, code: int) -> None:
    """Mark the end and leave together; the first rank stays behind until the writer has carried the rest."""
    whole = code == DONE and session.end == session.steps
    if session.log is not None:
        if code == DONE:
            session.log.metrics(session.step, session.ledger.metrics())
            session.line.say(session.ledger.summary() if whole else session.speed())
        if whole:
            (session.folder / "done").write_text(f"{session.step}\n")
        session.event({DONE: "done" if whole else "end", STOPPED: "stop", DIVERGED: "diverged"}[code])
    dist.barrier(group=session.member.control)  # who leaves early looks like a crash to the others
    cluster.leave()
    if session.log is not None:
        session.log.close()
        problem = writer.close(patience=20.0 if code == STOPPED else 120.0) if writer is not None else None
        if problem:
            session.line.say(problem)
        if code == STOPPED:
            session.line.say(f"stopped on request at step {session.step}, saved; the same command continues")


def main(arguments: list[str], run: Run | None = None) -> NoReturn:
    """Run one rank of `run`, or of the run that `arguments[0]`, a run.json, describes, and end the process.

    It ends at once, without Python's own end, which may wait for ever on a collective that a failed rank left pending,
    and in which a request to stop would kill a rank that has finished.
    """
    stop = StopFlag()
    try:
        code = train(run or resolve.recorded(Path(arguments[0])), stop)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        code = INPUT_ERROR
    except Exception:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BrokenPipeError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
