"""A run's state on disk: plain safetensors and JSON, atomic, verified before use. No pickle.

    checkpoints/step-00001234/
      rank-00000.safetensors  1-D "value", "exp_avg", "exp_avg_sq", "ema" if kept: this rank's pieces, fp32 or bf16
      rank-00000.json         their intervals: [[parameter name, offset in it, length], ...], in the same order
      buffers-00.safetensors  BatchNorm's running statistics by name, their averages as "ema/NAME", of a stage's blocks
      state.json              step, cursor of the data, ledger, configuration
      manifest.json           bytes and sha256 of every file above
      COMPLETE                sha256 of manifest.json; written last, a folder without it does not count

Fragments are loaded by intersecting intervals, so the files do not depend on how many ranks read them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.engine.ema import AVERAGE, running_statistics
from trainer.state import retention, snapshot
from trainer.state.durable import FORMAT, make_folder, sync, write_text
from trainer.state.durable import damage as damage
from trainer.state.retention import Hold, step_folder
from trainer.state.snapshot import Snapshot
from trainer.state.sources import Sources, load_buffers


class SaveError(RuntimeError):
    """A checkpoint could not be written; another try may succeed, so this is a crash and not bad input."""


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: where it is and its small state. It is not deleted while this object lives."""

    path: Path
    state: dict[str, Any]
    hold: Hold = field(default_factory=lambda: Hold(None), compare=False)

    @property
    def step(self) -> int:
        """Optimizer updates made when it was saved."""
        return int(self.state["step"])


def save(
    root: Path,
    step: int,
    state: dict[str, Any],
    fragments: list[Fragment],
    buffers: dict[str, Tensor],
    member: Member,
) -> Path:
    """Write one checkpoint, all ranks together; on any rank's failure nothing is left and all ranks know why.

    Raises:
        SaveError: some rank could not write; older checkpoints are untouched.
    """
    return commit(root, step, snapshot.of(state, fragments, buffers), member)[0]


def commit(root: Path, step: int, part: Snapshot, member: Member) -> tuple[Path, int]:
    """Write one checkpoint of every rank's snapshot; see `save`. All collectives are on `member.control`.

    Returns:
        Its folder and its bytes.
    """
    final = step_folder(root, step)
    aside = final.with_suffix(".partial")
    failure = ""
    if member.first:
        failure = _attempt(lambda: _fresh(root, aside))
    _agree(failure, member, final)
    report: dict[str, list[Any]] = {}
    failure = _attempt(lambda: report.update(part.write(aside, member)))
    reports = _agree(failure, member, final, report)
    files = {name: facts for part in reports for name, facts in part.items()}
    if member.first:
        failure = _attempt(lambda: _complete(aside, final, files))
    _agree(failure, member, final)
    return final, sum(size for size, _ in files.values())


def newest(root: Path, member: Member, say: Any = print) -> Saved | None:
    """The newest checkpoint whose every file verifies on some rank, all ranks agreeing; None if there is none.

    What is passed over, and why, goes to `say` on the first rank.

    Raises:
        FormatError: the newest whole one is of a release whose format this program does not read.
    """
    names = [[path.name for path in retention.found(root)]]
    dist.broadcast_object_list(names, src=0, group=member.control)  # one list for all, whatever each disk shows
    for path in [root / name for name in names[0]]:
        held = retention.hold(path)
        problem = damage(path, member.rank, member.world)
        problems: list[str] = [""] * member.world
        dist.all_gather_object(problems, problem, group=member.control)
        found = next((text for text in problems if text), "")
        if not found:
            return opened(path, held)
        if member.first:
            say(f"passed over {path}: {found}")
        held.release()
    return None


def opened(path: Path, held: Hold | None = None) -> Saved:
    """A checkpoint that verified, with its small state. `held` since before it was verified, or from now on."""
    return Saved(path, json.loads((path / "state.json").read_text()), held or retention.hold(path))


def restore(saved: Saved, fragments: list[Fragment], buffers: dict[str, Tensor]) -> None:
    """Fill this rank's fragments and the buffers from a checkpoint of any number of ranks.

    Raises:
        CheckpointError: a parameter or buffer is missing or of another size.
    """
    sources = Sources(saved.path)
    for fragment in fragments:
        for kind, target in {"value": fragment.value, **fragment.moments}.items():
            sources.fill(kind, fragment.name, fragment.offset, target)
    load_buffers(saved.path, buffers)


def load_parameters(saved: Saved, model: nn.Module, average: bool = False) -> None:
    """Fill a whole model's parameters and buffers, for evaluation; no optimizer, no process group.

    Args:
        average: the moving averages in place of the raw weights.

    Raises:
        CheckpointError: something is missing or of another size.
    """
    targets = dict(model.named_parameters()) | running_statistics(model)
    with torch.no_grad():
        for name, value in tensors(saved, model, average):
            targets[name].copy_(value)


def tensors(saved: Saved, model: nn.Module, average: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors that fill `model`, on any device, one after the other, fp32 on the CPU. See `load_parameters`."""
    sources = Sources(saved.path)
    for name, parameter in model.named_parameters():
        flat = torch.empty(parameter.numel(), dtype=torch.float32, device="cpu")
        sources.fill("ema" if average else "value", name, 0, flat)
        yield name, flat.view(parameter.shape)
    prefix = AVERAGE if average else ""
    own = running_statistics(model)
    statistics = {prefix + name: torch.empty_like(buffer, device="cpu") for name, buffer in own.items()}
    load_buffers(saved.path, statistics)
    yield from ((name.removeprefix(prefix), value) for name, value in statistics.items())


def _attempt(work: Any) -> str:
    """Do `work`; the reason if the disk or the system refused."""
    try:
        work()
    except (OSError, RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _agree(failure: str, member: Member, final: Path, report: Any = None) -> list[Any]:
    """Exchange failures and reports; if any rank failed, all raise and what was written of it is removed."""
    answers: list[Any] = [None] * member.world
    dist.all_gather_object(answers, (failure, report), group=member.control)
    bad = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
    if bad:
        if member.first:
            shutil.rmtree(final.with_suffix(".partial"), ignore_errors=True)
            if not (final / "COMPLETE").exists():
                shutil.rmtree(final, ignore_errors=True)
        raise SaveError(f"could not save {final}: {'; '.join(bad)}. Older checkpoints are untouched")
    return [part for _, part in answers]


def _fresh(root: Path, aside: Path) -> None:
    """An empty folder to write into."""
    make_folder(root)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def _complete(aside: Path, final: Path, files: dict[str, list[Any]]) -> None:
    """Write the manifest, give the folder its name, then mark it complete.

    All that takes room on the disk is written before the folder has its name. One of the same step that is there
    (training was rolled back behind it) stays beside until the new one counts.
    """
    text = json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True)
    write_text(aside / "manifest.json", text)
    write_text(aside / "COMPLETE.tmp", hashlib.sha256(text.encode()).hexdigest())
    sync(aside)
    retention.settle_replaced(final)
    with retention.alone(final) as unread:
        if not unread:
            raise OSError(f"{final} is being read and cannot be replaced")
        if final.is_dir():
            os.replace(final, final.with_suffix(".replaced"))
        try:
            os.replace(aside, final)
            sync(final.parent)
            os.replace(final / "COMPLETE.tmp", final / "COMPLETE")
            sync(final)
        finally:
            retention.settle_replaced(final)
