"""Where a run goes on from. The order of precedence is here and nowhere else.

1. its own newest checkpoint of which every file verifies on some rank, all ranks agreeing;
2. the weights that `init.path` names, of another run or a file (`trainer/state/warm_start.py`);
3. fresh weights.

A save that was interrupted is passed over without more ado. Where there are complete checkpoints and none verifies,
the run is refused: to begin anew would give up all it learnt, and delete what somebody may still mend.
A checkpoint that was written for other settings or other data is not passed over: the run is refused with what
differs, and `resume.allow` names what may.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs import resolve
from configs.errors import InputError
from configs.resume_rules import DATASET, SCRATCH, Difference, refuse
from configs.run_json import flattened
from configs.schema import Run
from data_pipeline import mixture
from data_pipeline.manifest import Dataset, Split
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from trainer.cluster import Member
from trainer.state import checkpoint, retention
from trainer.state.checkpoint import Saved
from trainer.state.skips import Skipped


@dataclass
class Found:
    """What a run goes on from.

    Attributes:
        saved: its own checkpoint; None: from `init.path` or from fresh weights.
        passed: checkpoints that did not verify, newest first, and why.
        allowed: the differences that `resume.allow` let pass.
    """

    saved: Saved | None
    passed: list[str] = field(default_factory=list)
    allowed: list[Difference] = field(default_factory=list)

    def facts(self, run: Run) -> dict[str, Any]:
        """What the run's events say about it."""
        source = str(self.saved.path) if self.saved is not None else run.init.path or "fresh weights"
        return {"source": source, "passed_over": self.passed, "allowed": [list(row) for row in self.allowed]}


def find(root: Path, run: Run, dataset: Dataset, member: Member, say: Callable[[str], object]) -> Found:
    """The checkpoint under `root` that the run goes on from. A collective call.

    Args:
        say: takes what is passed over and what differs, on the first rank.

    Raises:
        InputError: the newest good checkpoint is of another spec, recipe or data set, with every difference; or there
            are complete ones and none is good.
    """
    passed: list[str] = []

    def note(text: str) -> None:
        """Keep and tell what is passed over."""
        passed.append(text)
        say(text)

    if member.first:
        retention.clear(root)
    dist.barrier(group=member.control)
    saved = checkpoint.newest(root, member, note)
    if saved is None:
        _refuse_to_lose(root, run, member)
        if passed and member.first:
            say(f"{root}: no checkpoint verifies; starts from {run.init.path or 'fresh weights'}")
        return Found(None, passed)
    allowed = _check(saved, run, dataset)
    for key, was, now in allowed if member.first else ():
        say(f"{saved.path}: {key} was {was!r}, is {now!r} (resume.allow)")
    return Found(saved, passed, allowed)


def open_order(run: Run, split: Split, saved: Saved | None) -> Order | Mixture:
    """The order of samples: the saved one where a checkpoint is continued, else the recipe's.

    With another data set that `resume.allow` names, the recipe's order over it; the cursor goes on at the same number
    of samples.

    Raises:
        InputError: the order was written for other data or another batch.
    """
    if saved is None or (_another(saved, split) and DATASET in run.resume.allow):
        return mixture.begin(run, split)
    try:
        order, consumed = mixture.resume(saved.state["order"], split)
    except InputError as error:
        hint = f"; --resume.allow {DATASET} goes on over the data here" if _another(saved, split) else ""
        raise InputError(f"{saved.path}: {error}{hint}") from None
    taken = Skipped(saved.state.get("guard", {}).get("skipped", [])).batch(saved.step)
    if consumed != taken * run.data.global_batch:
        raise InputError(
            f"{saved.path}: {consumed} samples in {taken} batches is not data.global_batch = "
            f"{run.data.global_batch}; take the batch the run began with"
        )
    return order


def _refuse_to_lose(root: Path, run: Run, member: Member) -> None:
    """Refuse to begin anew beside complete checkpoints, of which none verified. A collective call.

    Raises:
        InputError: naming them, and what would do.
    """
    complete = [[path.name for path in retention.found(root) if (path / "COMPLETE").exists()]]
    dist.broadcast_object_list(complete, src=0, group=member.control)
    if complete[0] and SCRATCH not in run.resume.allow:
        raise InputError(
            f"{root}: {', '.join(complete[0])}: complete, but damaged; the run begins anew from "
            f"{run.init.path or 'fresh weights'} with --resume.allow {SCRATCH}, or under another --name; "
            f"`coatnet checkpoint verify {root.parent}` names the files, which a copy from elsewhere may mend"
        )


def _another(saved: Saved, split: Split) -> bool:
    """Whether the checkpoint's cursor was written for another training split."""
    return bool(saved.state["order"].get("fingerprint") != split.fingerprint)


def _check(saved: Saved, run: Run, dataset: Dataset) -> list[Difference]:
    """Hold a checkpoint against the run and its data; returns the differences that were allowed.

    Raises:
        InputError: every difference that is not. Other data are refused by the cursor, in `open_order`.
    """
    differences = recorded_differences(saved.state.get("run", {}), run)
    split = dataset.split("train")
    if _another(saved, split) and DATASET in run.resume.allow:
        was = str(saved.state["order"].get("fingerprint"))
        differences.append((DATASET, was[:12], f"{split.fingerprint[:12]} ({dataset.root})"))
        if list(dataset.vocabulary) != saved.state.get("vocabulary", list(dataset.vocabulary)):
            raise InputError(
                f"{saved.path}: was trained on other classes than those of {dataset.root}; a new run takes its weights "
                f"with --init.path and --init.head reset"
            )
    allowed = refuse(differences, run.resume.allow, f"{saved.path} is of another run")
    averages = [now for key, was, now in allowed if key == "optim.ema" and not was]
    if averages:
        raise InputError(f"{saved.path}: optim.ema = {averages[0]}: it holds no averaged weights; nearest valid: 0.0")
    return allowed


def recorded_differences(document: dict[str, Any], run: Run) -> list[Difference]:
    """The fields in which a Run's JSON, perhaps of an older release, differs from a Run.

    Fields that the release did not know had what is now their default.
    """
    was = dict(resolve.flat(Run())) | flattened(document)
    now = json.loads(json.dumps(resolve.flat(run)))
    return [(key, was[key], value) for key, value in now.items() if document and _plain(was[key]) != value]


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
