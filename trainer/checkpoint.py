"""A run's state on disk: plain safetensors and JSON, atomic, verified before use. No pickle.

    checkpoints/step-00001234/
      rank-00000.safetensors  1-D fp32 "value", "exp_avg", "exp_avg_sq", "ema" if kept: this rank's pieces
      rank-00000.json         their intervals: [[parameter name, offset in it, length], ...], in the same order
      buffers.safetensors     BatchNorm's running statistics by name, their averages as "ema/NAME"
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs.errors import InputError
from trainer.cluster import Member
from trainer.deepspeed_shims import Fragment
from trainer.durable import FORMAT, manifest_files, save_tensors, sync, sync_and_measure, verify
from trainer.ema import AVERAGE, running_statistics


class CheckpointError(InputError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; another try may succeed, so this is a crash and not bad input."""


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: where it is and its small state."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer updates made when it was saved."""
        return int(self.state["step"])


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates."""
    return root / f"step-{step:08d}"


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
    final = step_folder(root, step)
    aside = final.with_suffix(".partial")
    failure = ""
    if member.first:
        failure = _attempt(lambda: _fresh(root, aside))
    _agree(failure, member, aside)
    report: dict[str, list[Any]] = {}
    failure = _attempt(lambda: report.update(_write_files(aside, state, fragments, buffers, member)))
    reports = _agree(failure, member, aside, report)
    if member.first:
        files = {name: facts for part in reports for name, facts in part.items()}
        failure = _attempt(lambda: _complete(aside, final, files))
    _agree(failure, member, aside)
    return final


def newest(root: Path, member: Member, say: Any = print) -> Saved | None:
    """The newest checkpoint whose every file verifies on some rank, all ranks agreeing; None if there is none.

    What is passed over, and why, goes to `say` on the first rank.
    """
    names = [[path.name for path in sorted(root.glob("step-????????"), reverse=True)]]
    dist.broadcast_object_list(names, src=0, group=member.control)  # one list for all, whatever each disk shows
    for path in [root / name for name in names[0]]:
        problem = damage(path, member.rank, member.world)
        problems: list[str] = [""] * member.world
        dist.all_gather_object(problems, problem, group=member.control)
        found = next((text for text in problems if text), "")
        if not found:
            return opened(path)
        if member.first:
            say(f"passed over {path}: {found}")
    return None


def damage(path: Path, rank: int = 0, world: int = 1) -> str:
    """What is wrong with a checkpoint's files, or nothing; of `world` callers each reads its share."""
    files = manifest_files(path)
    if isinstance(files, str):
        return files
    mine = sorted(files)[rank::world]
    return next((bad for name in mine if (bad := verify(path / name, *files[name]))), "")


def opened(path: Path) -> Saved:
    """A checkpoint that verified, with its small state."""
    return Saved(path, json.loads((path / "state.json").read_text()))


def restore(saved: Saved, fragments: list[Fragment], buffers: dict[str, Tensor]) -> None:
    """Fill this rank's fragments and the buffers from a checkpoint of any number of ranks.

    Raises:
        CheckpointError: a parameter or buffer is missing or of another size.
    """
    sources = _Sources(saved.path)
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
    sources = _Sources(saved.path)
    for name, parameter in model.named_parameters():
        flat = torch.empty(parameter.numel(), dtype=torch.float32, device="cpu")
        sources.fill("ema" if average else "value", name, 0, flat)
        yield name, flat.view(parameter.shape)
    prefix = AVERAGE if average else ""
    own = running_statistics(model)
    statistics = {prefix + name: torch.empty_like(buffer, device="cpu") for name, buffer in own.items()}
    load_buffers(saved.path, statistics)
    yield from ((name.removeprefix(prefix), value) for name, value in statistics.items())


def load_buffers(path: Path, wanted: dict[str, Tensor]) -> None:
    """Fill buffers from `buffers.safetensors`, by name.

    Raises:
        CheckpointError: one that is wanted is not there, or has another size.
    """
    with safe_open(path / "buffers.safetensors", framework="pt") as stored:
        missing = sorted(set(wanted) - set(stored.keys()))
        if missing:
            raise CheckpointError(f"{path / 'buffers.safetensors'}: has no {missing[0]}; it belongs to another model")
        for name, buffer in wanted.items():
            value = stored.get_tensor(name)
            if value.shape != buffer.shape:
                raise CheckpointError(
                    f"{path / 'buffers.safetensors'}: {name} has shape {tuple(value.shape)}, the model "
                    f"{tuple(buffer.shape)}"
                )
            buffer.copy_(value)


def prune(root: Path, keep: int, step: int) -> list[str]:
    """Delete all but the newest `keep` checkpoints up to the one of `step`, which was just written.

    Those of later steps belong to a past that was passed over as damaged; they and what interrupted saves left
    behind go too.

    Returns:
        What could not be deleted, a sentence each; training need not end for it.
    """
    found = sorted(root.glob("step-????????"))
    good = [path for path in found if (path / "COMPLETE").exists() and path <= step_folder(root, step)]
    problems = []
    for path in [path for path in found if path not in good[-keep:]] + list(root.glob("step-*.partial")):
        try:
            (path / "COMPLETE").unlink(missing_ok=True)  # first, so that a half-deleted folder never counts
            shutil.rmtree(path)
        except OSError as error:
            problems.append(f"could not delete {path}: {error}")
    return problems


class _Sources:
    """The fragments of a checkpoint, found by parameter name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: dict[str, list[tuple[int, int, int, Path]]] = {}  # name: (offset, length, place, file)
        for index in sorted(path.glob("rank-*.json")):
            place = 0
            for name, offset, length in json.loads(index.read_text()):
                self._parts.setdefault(name, []).append((offset, length, place, index.with_suffix(".safetensors")))
                place += length
        self._open: dict[Path, Any] = {}

    def fill(self, kind: str, name: str, offset: int, target: Tensor) -> None:
        """Copy elements [offset, offset + len(target)) of a parameter's `kind` into `target` (1-D)."""
        end, filled = offset + target.numel(), 0
        for start, length, place, file in self._parts.get(name, []):
            low, high = max(offset, start), min(end, start + length)
            if low < high:
                if file not in self._open:
                    self._open[file] = safe_open(file, framework="pt")
                stored = self._open[file].get_slice(kind)
                target[low - offset : high - offset].copy_(stored[place + low - start : place + high - start])
                filled += high - low
        if filled != target.numel():
            raise CheckpointError(
                f"{self.path}: holds {filled} of the {target.numel()} elements of {name} ({kind}) from {offset} on; "
                f"it belongs to another model"
            )


def _attempt(work: Any) -> str:
    """Do `work`; the reason if the disk or the system refused."""
    try:
        work()
    except (OSError, RuntimeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _agree(failure: str, member: Member, aside: Path, report: Any = None) -> list[Any]:
    """Exchange failures and reports; if any rank failed, all raise and the partial folder is removed."""
    answers: list[Any] = [None] * member.world
    dist.all_gather_object(answers, (failure, report), group=member.control)
    bad = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
    if bad:
        if member.first:
            shutil.rmtree(aside, ignore_errors=True)
        raise SaveError(f"could not save {aside}: {'; '.join(bad)}. Older checkpoints are untouched")
    return [part for _, part in answers]


def _fresh(root: Path, aside: Path) -> None:
    """An empty folder to write into."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def _write_files(
    aside: Path, state: dict[str, Any], fragments: list[Fragment], buffers: dict[str, Tensor], member: Member
) -> dict[str, list[Any]]:
    """Write this rank's files; returns {name: [bytes, sha256]}."""
    stem = f"rank-{member.rank:05d}"
    kinds: dict[str, list[Tensor]] = {"value": []}
    for fragment in fragments:
        for kind, part in {"value": fragment.value, **fragment.moments}.items():
            kinds.setdefault(kind, []).append(part.detach().cpu())
    tensors = {kind: torch.cat(parts) if parts else torch.empty(0) for kind, parts in kinds.items()}
    save_tensors(tensors, aside / f"{stem}.safetensors")
    intervals = [[part.name, part.offset, part.value.numel()] for part in fragments]
    (aside / f"{stem}.json").write_text(json.dumps(intervals))
    names = [f"{stem}.safetensors", f"{stem}.json"]
    if member.first:
        kept = {name: buffer.detach().cpu().contiguous() for name, buffer in buffers.items()}
        save_tensors(kept, aside / "buffers.safetensors")
        (aside / "state.json").write_text(json.dumps({"format": FORMAT, **state}, indent=1))
        names += ["buffers.safetensors", "state.json"]
    return {name: sync_and_measure(aside / name) for name in names}


def _complete(aside: Path, final: Path, files: dict[str, list[Any]]) -> None:
    """Write the manifest, give the folder its name, then mark it complete."""
    manifest = aside / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True))
    sync_and_measure(manifest)
    sync(aside)
    shutil.rmtree(final, ignore_errors=True)  # an older, incomplete save of the same step
    os.replace(aside, final)
    sync(final.parent)
    mark = final / "COMPLETE.tmp"
    mark.write_text(hashlib.sha256((final / "manifest.json").read_bytes()).hexdigest())
    sync(mark)
    os.replace(mark, final / "COMPLETE")
    sync(final)
