"""What follows from the guard's verdicts: written down, said, and where the run wants it, undone.

A rollback restores the newest checkpoint that verifies and lies `guard.rollback_steps` or more before the bad step, in
place. The run goes on from there without the batches that the bad one is among; the schedule goes by updates and does
not move. The past that was undone ends as a checkpoint does not count any more before the skipped batches are saved,
so that a crash at any moment leaves a run that either goes on without them or finds the bad one again.
"""

import math
from typing import Any, Literal

import torch.distributed as dist

from trainer.health.evidence import gathered
from trainer.health.judge import Verdict
from trainer.session import Session
from trainer.state import checkpoint, retention
from trainer.state.checkpoint import Saved

Outcome = Literal["go on", "rolled back", "stop"]

SAYS = {
    "nonfinite": "loss or gradient not finite",
    "spike": "loss spike",
    "explosion": "gradient norm explodes",
    "divergence": "diverged",
    "drift": "replicas differ",
    "slow_rank": "slow rank",
    "input_bound": "waits for data",
}
WAYS = {
    "divergence": "Lower optim.lr or lengthen the warm-up, under another --name",
    "drift": "A machine computes wrongly: look at the named rank's",
}


def act(session: Session, verdicts: list[Verdict]) -> Outcome:
    """Do what the run wants done about `verdicts`; write down and say it. A collective call."""
    guard, stop, undo = session.guard, "", []
    for verdict in verdicts:
        action, because = guard.decide(verdict)
        facts = guard.facts(verdict)
        session.event("guard", **_described(verdict), **facts, action=action, because=because)
        text = _sentence(verdict, facts)
        session.line.say(f"guard: {text}: {action}{' because ' + because if because else ''}")
        if action == "stop":
            stop = stop or ". ".join(
                filter(None, (f"{text}{', and ' + because if because else ''}", WAYS.get(verdict.kind)))
            )
        if action == "rollback":
            undo.append(verdict)
    if undo and not stop:
        first = min(undo, key=lambda verdict: verdict.since)
        if roll_back(session, first, data=any(verdict.kind != "drift" for verdict in undo)):
            return "rolled back"
        stop = f"{_sentence(first, {})}, and no checkpoint lies far enough before it to go back to"
    if stop:
        session.line.say(f"stopped by the guard at step {session.step}: {stop}")
        return "stop"
    return "go on"


def roll_back(session: Session, verdict: Verdict, data: bool) -> bool:
    """Go back behind a verdict, in place; false if there is nothing to go back to. A collective call.

    Args:
        data: leave out the batches around the bad one; otherwise the same ones come again.
    """
    guard, member, bad, from_step = session.guard, session.member, verdict.since, session.step
    back = guard.wish.rollback_steps if data else 0
    session.tell_saves(wait=True)
    with session.clock.of("restart"):
        saved = newest_until(session, bad - 1 - back)
        if saved is None:
            return False
        first = guard.skipped.batch(bad - 1) - back
        skipped = [first, first + guard.wish.skip_batches] if data else []
        _restore(session, saved)
        if data:
            guard.skipped.add(*skipped)
        if member.first:
            _disown(session, saved.step)
        dist.barrier(group=member.control)
    session.event("rollback", of=verdict.kind, from_step=from_step, to_step=saved.step, skipped=skipped)
    without = (
        f", goes on without batches {skipped[0]} to {skipped[1] - 1}" if skipped else ", takes the same data again"
    )
    session.line.say(f"rolled back from step {from_step} to {saved.path}{without}")
    session.save()
    return True


def _restore(session: Session, saved: Saved) -> None:
    """Let the run be where it was when it saved. A collective call."""
    engine = session.engine
    session.guard.rewind(saved.state.get("guard", {}))
    checkpoint.restore(saved, engine.fragments(owned=False), engine.buffers())
    engine.restored(int(saved.state["updates"]))
    session.go_on(saved.state)
    session.step = session.saved = saved.step
    saved.hold.release()


def newest_until(session: Session, step: int) -> Saved | None:
    """The newest checkpoint after at most `step` updates of which every file verifies. A collective call."""
    member, root = session.member, session.saver.root
    names = gathered([path.name for path in retention.found(root)] if member.first else None, member)[0]
    for path in [root / name for name in names]:
        if retention.step_of(path) > step:
            continue
        held = retention.hold(path)
        problem = next(filter(None, gathered(checkpoint.damage(path, member.rank, member.world), member)), "")
        if not problem:
            return checkpoint.opened(path, held)
        session.line.say(f"passed over {path}: {problem}")
        held.release()
    return None


def _disown(session: Session, step: int) -> None:
    """Let the checkpoints after `step` count no more; the next save deletes them."""
    for path in retention.found(session.saver.root):
        if retention.step_of(path) > step:
            (path / "COMPLETE").unlink(missing_ok=True)  # also of one that somebody reads: its files stay till then


def _described(verdict: Verdict) -> dict[str, Any]:
    """A verdict as an event has it; JSON has no numbers that are not finite."""
    value = verdict.value if math.isfinite(verdict.value) else str(verdict.value)
    threshold = verdict.threshold if math.isfinite(verdict.threshold) else None
    return {"of": verdict.kind, "of_step": verdict.step, "since": verdict.since, "value": value, "threshold": threshold}


def _sentence(verdict: Verdict, facts: dict[str, Any]) -> str:
    """A verdict in words."""
    limit = f" (limit {verdict.threshold:.4g})" if math.isfinite(verdict.threshold) else ""
    where = [f"rank {', '.join(map(str, facts['rank']))}"] if facts.get("rank") else []
    where += [f"{name} {facts[name]}" for name in ("block", "batch") if facts.get(name) is not None]
    named = facts.get("samples" if verdict.kind == "nonfinite" else "tensors", [])
    where += [", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")] if named else []
    return f"{SAYS[verdict.kind]} at step {verdict.step}, {verdict.value:.4g}{limit}" + "".join(
        f", {part}" for part in where
    )
