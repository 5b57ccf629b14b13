"""The road of a run, in the order it is walked.

One process per device runs this; `trainer/launch.py` starts them as `python -m trainer.train runs/NAME/run.json`.
"""

import contextlib
import json
import multiprocessing.util
import os
import shutil
import sys
import traceback
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from data_pipeline import resample
from data_pipeline.stream import Batch, open_data, train_loader
from models import attention, cost, spec
from trainer import cluster
from trainer.bench.profiling import Profile
from trainer.cost import statement
from trainer.cost.energy import EnergyMeter, holding
from trainer.cost.ledger import Ledger
from trainer.engine import deepspeed_shims, disk, network
from trainer.engine.engine import Engine
from trainer.engine.optim import learning_rate
from trainer.health import goodput, pulse
from trainer.health.guard import Guard
from trainer.health.rollback import act
from trainer.health.stopping import StopFlag, end_of
from trainer.machine import environment
from trainer.machine import watch as machine
from trainer.plan import layout
from trainer.planning import beside, fit
from trainer.report.write import report
from trainer.session import Session, part_of
from trainer.stages import partition, recorder
from trainer.state import checkpoint, resume
from trainer.state.warm_start import warm_start
from trainer.step import train_step
from trainer.tracking import data_card
from trainer.tracking.meter import Meter, resident_bytes
from trainer.tracking.progress import ProgressLine
from trainer.tracking.track import CarryProcess, RunLog, run_folder, wanted

DONE, STOPPED, INPUT_ERROR, DIVERGED = 0, 75, 76, 77


def train(run: Run, stop: StopFlag) -> int:
    """Train `run` on this rank, from its newest verified checkpoint if it has one.

    Returns:
        The exit code of DESIGN.md: done, stopped on request and saved, or diverged.
    """
    local_rank = cluster.local_rank()
    disk.load(run)
    member = cluster.join(run)
    if member.first:
        stop.watch(run_folder(run), end_of(run))
    attempt = goodput.attempt(run_folder(run), member.world, member.first)
    with attempt as clock, pulse.beating(clock, member, local_rank) as beats:
        session = prepare(run, member, clock, beats)
        writer = CarryProcess(run, session.folder) if member.first and wanted(run) else None
        try:
            every = run.tracking.system_every if member.speaks else 0.0
            with machine.watched(session.folder, every, lambda: session.step, session.meter.energy):
                code = loop(session, stop)
                if code == DONE and session.end == session.steps and not session.score(stop, final=True):
                    code = STOPPED
            close(session, writer, code, stop)
        except InputError:
            session.rescue_save()
            raise
        finally:
            session.line.close()
            disk.clear(run, member.rank)
    return code


def prepare(run: Run, member: cluster.Member, clock: goodput.Clock, beats: pulse.Pulse) -> Session:
    """Open the data, find where to go on, build the network and its engine, restore or initialise."""
    disk.keep_no_memory(run)
    deepspeed_shims.imported()  # first, so that what libraries take of the memory is known apart
    base = resident_bytes(member.device)
    folder, plan, dataset = run_folder(run), layout(run, member.world), open_data(run)
    split = dataset.split("train")
    steps, warmup = resolve.total_steps(run, split.samples), resolve.warmup(run, split.samples)
    end = min(steps, run.steps or steps)
    line = ProgressLine(folder.name, end, member.first, run.cluster.currency)
    found = resume.find(folder / "checkpoints", run, dataset, member, line.say)
    saved, order = found.saved, resume.open_order(run, split, found.saved)

    disk.clear(run, member.rank)
    bias = network.head_bias(run, dataset)
    engine = Engine(network.in_layout(run, dataset.classes, plan, member, bias), run, plan, member)
    began_from = warm_start(run, dataset, engine) if saved is None and run.init.path else {}
    counts = cost.count(spec.of(run.model), run.model.resolution, classes=dataset.classes)
    meter = Meter(member, counts.multiply_adds, run.data.global_batch, EnergyMeter(member), base)
    ledger = Ledger(counts.multiply_adds, holding(run, member, meter.energy))
    guard = Guard(run, engine)
    step = 0
    if saved is not None:
        step = saved.step
        guard.restore(saved.state["guard"])
        checkpoint.restore(saved, engine.fragments(owned=False), engine.buffers())
        engine.restored(int(saved.state["updates"]))

    session = Session(
        run=run, folder=folder, member=member, dataset=dataset, split=split, order=order, engine=engine, ledger=ledger,
        meter=meter, log=RunLog(folder) if member.first else None, line=line, steps=steps, warmup=warmup, end=end,
        step=step, clock=clock, pulse=beats, guard=guard,
        latest=dict(saved.state.get("meters", {})) if saved is not None else {},
    )  # fmt: skip
    session.go_on(saved.state if saved is not None else None)
    announce(session)
    session.event("origin", **found.facts(run))
    if began_from:
        session.event("init", **began_from)
        line.say(f"starts from the {began_from['weights']} weights of {run.init.path}, step {began_from['of_step']}")
    return session


def foretold(session: Session) -> dict[str, Any]:
    """What the planner says of this layout: this rank's bytes at its peak, seconds of a step if it knows the device."""
    run, member, plan = session.run, session.member, session.engine.layout
    predicted = fit.estimate(run, plan, session.dataset.classes, member.stage)
    found = {"bytes": predicted.total, **asdict(predicted)}
    machines = beside.machines_of(member.device_name, member.world, cluster.local_world())
    if machines is not None:
        try:
            seconds = beside.seconds(run, session.dataset.classes, plan, machines)
            found |= {"step_seconds": seconds.total, "rates": beside.origin(run, machines)}
        except InputError as error:  # a file of rates of another release stops no training
            session.line.say(f"no step time is foretold: {error}")
    return found


def announce(session: Session) -> None:
    """Write down and say what is about to run, on the first rank."""
    run, member, plan = session.run, session.member, session.engine.layout
    session.line.start(session.step)
    if not member.first:
        return
    kind = "resume" if session.step else "start"
    session.engine.write_config(session.folder)
    data_card.write(session.folder, session.dataset)
    (session.folder / "environment.json").write_text(json.dumps(environment.facts(member.device_name), indent=2))
    session.event(
        kind,
        end=session.end,
        world=member.world,
        device=member.device_name,
        **environment.place(),
        config=resolve.digest(run),
        attention=attention.resolve(run.model.attention, member.device),
    )
    session.event("predicted", base=session.meter.base, **foretold(session))
    parameters = sum(fragment.value.numel() for fragment in session.engine.fragments(owned=True))
    if plan.stages > 1:
        session.line.say(partition.table(partition.stages(run, session.dataset.classes, plan.micro_batch)))
    if session.dataset.resampled:
        session.line.say(resample.notice(session.dataset))
    session.line.say(
        f"{kind} {session.folder} at step {session.step} of {session.end}: {run.model.name} at "
        f"{run.model.resolution} px, {session.dataset.classes} classes, {session.split.samples:,} images\n"
        f"{member.world} x {member.device_name}, ZeRO-{run.parallel.zero}, recompute {run.parallel.recompute}, "
        f"{run.precision.dtype}; global batch {plan.global_batch} = {plan.replicas} replicas x {plan.accumulation} x "
        f"{plan.micro_batch}, BatchNorm over {plan.replica_batch}; {parameters:,} parameters on this rank; "
        f"clip {run.optim.clip_norm:g}; attention {attention.resolve(run.model.attention, member.device)}"
    )
    session.warn_of_low_disk()


def loaded(session: Session) -> Generator[Batch]:
    """This rank's micro-batches from the session's step to its end, without the batches that the run leaves out."""
    run, part = session.run, part_of(session.member)
    slices, size = session.engine.layout.slices(session.member.replica), run.data.global_batch
    return session.pulse.over(
        batch
        for first, count in session.guard.skipped.stretches(session.step, session.end - session.step)
        for batch in train_loader(session.dataset, run, session.order, slices, first * size, count, part)
    )


def loop(session: Session, stop: StopFlag) -> int:
    """Steps until the end or a request to stop; logs, saves and evaluates when due."""
    run, guard, batches = session.run, session.guard, loaded(session)
    classes = session.dataset.classes
    trace = recorder.begin(run, classes, session.folder, session.engine) if run.parallel.trace else None
    profile = Profile(run, classes, session.folder, session.engine, session.meter.base) if run.profile else None
    watchers = [watcher for watcher in (trace, profile) if watcher is not None]
    code = STOPPED if stop.agreed_now(session.member) else DONE
    session.meter.restart()
    session.clock.enter("productive")
    while session.step < session.end and code == DONE:
        rate = learning_rate(run.optim, session.step, session.steps, session.warmup)
        limits = guard.begin()
        session.step += 1
        with contextlib.ExitStack() as watched:
            for watcher in watchers:
                watched.enter_context(watcher.step(session.step))
            result = train_step(session.engine, batches, run, classes, rate, session.step, guard.gate(limits))
        guard.take(session.step, result, limits)
        session.trained(run.data.global_batch)
        session.meter.step(result.loss, result.healthy, result.waited)
        session.clock.stepped(session.step, result.waited)
        if session.pulse.step() == goodput.WARM:
            cluster.shorten(run, session.saver.groups)
        stopping = stop.agreed(session.member, session.save_seconds)
        session.tell_saves()
        scoring = session.step < session.end and run.evaluate.every > 0 and session.due(run.evaluate.every)
        scoring = scoring and not stopping
        saving = (stop.saves() or stopping or session.save_due(scoring)) and not run.data.synthetic
        # A save or an evaluation ends the interval of the figures, and no diverged state is saved.
        logging = saving or scoring or session.due(run.tracking.log_every)
        if logging:
            session.log_line(rate, float(result.grad_norm))
        outcome = act(session, guard.verdicts(settle=saving or scoring or session.step == session.end))
        if outcome == "stop":
            code = DIVERGED
            break
        if outcome == "rolled back":
            batches.close()
            batches, saving, scoring = loaded(session), stopping, False
        if saving:
            session.save(last=stopping)
        if scoring:
            session.score(stop)
        if stop.stopping:
            code = STOPPED
    stop.finish()
    guard.close()
    session.tell_saves(wait=True)
    if code == STOPPED and session.saved != session.step and not run.data.synthetic:
        session.save(last=True)  # the ranks were asked while they scored, or what was to be saved then failed
    for watcher in watchers:
        watcher.close()
    return code


def close(session: Session, writer: CarryProcess | None, code: int, stop: StopFlag) -> None:
    """Mark the end and leave together, once the first rank's writer has carried the rest.

    Together, because who leaves early looks like a crash to the others, and has srun end those that still carry.
    """
    whole = code == DONE and session.end == session.steps
    stop.finish()
    session.clock.enter("restart")
    session.meter.settle()
    book = session.count_time()
    if session.log is not None:
        if code == DONE:
            session.log.metrics(session.step, {**goodput.metrics(book), **session.ledger.metrics()})
            session.line.say(statement.summary(session.ledger) if whole else session.speed())
            session.line.say(goodput.summary(book))
        if whole:
            (session.folder / "done").write_text(f"{session.step}\n")
        reason = {"reason": stop.reason or "asked on another rank"} if code == STOPPED else {}
        session.event({DONE: "done" if whole else "end", STOPPED: "stop", DIVERGED: "diverged"}[code], **reason)
        if whole:
            session.line.say(told(session))
        for missing in session.log.close():
            session.line.say(missing)
        patience = min(20.0 if code == STOPPED else 120.0, session.run.cluster.timeout / 2)
        problem = writer.close(patience) if writer is not None else None
        if problem:
            session.line.say(problem)
        if code == STOPPED:
            state = "saved" if session.saved else "nothing to save"
            session.line.say(f"stopped on request at step {session.step}, {state}; the same command continues")
    dist.barrier(group=session.member.control)
    cluster.leave()


def told(session: Session) -> str:
    """Write the report of a finished run on the first rank; returns a sentence on it."""
    if session.clock.journal is not None:
        session.clock.journal.write()
    try:
        return f"report: {report(session.folder)}"
    except Exception as error:  # a page is not worth the run that has just been finished
        return f"no report was written: {error!r}; coatnet report {session.folder} tries again"


def main(arguments: list[str], run: Run | None = None) -> NoReturn:
    """Run one rank of `run`, or of the run that `arguments[0]`, a run.json, describes, and end the process.

    It ends at once, without Python's own end, which may wait for ever on a collective that a failed rank left pending,
    and in which a request to stop would kill a rank that has finished.
    """
    stop = StopFlag()
    pulse.listen()
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
    shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)  # of the loaders; else it would stay behind
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
