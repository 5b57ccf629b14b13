"""Which checkpoints stay: the newest, every so many steps, the best, what a rollback may want; never one that is read.

A reader holds a shared lock on a checkpoint's `COMPLETE`; who deletes takes it alone first, and passes over what is
being read. Where the file system has no locks, a reader whose checkpoint goes away fails with the name of the file.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from configs.schema import Checkpoint
from trainer.state.durable import damage, sync, write_text

SCORES = "scores.json"  # beside the checkpoints: {step: {metric: value}} of those that were evaluated, and its sha256
MARGIN = 1.05  # of the bytes of a checkpoint: file systems take some for themselves
PATIENCE, PAUSE = 60.0, 0.05  # seconds a reader waits for one who deletes or replaces, and between two looks

Scores = dict[int, dict[str, float]]  # by step


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.stem[5:])


def found(root: Path) -> list[Path]:
    """All folders of checkpoints, complete or not, the newest first."""
    return sorted(root.glob("step-????????"), reverse=True)


class Hold:
    """A checkpoint that is not deleted while this lives; `release` it, or let it go out of scope."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file

    def release(self) -> None:
        """Let others delete it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def hold(path: Path) -> Hold:
    """Keep a checkpoint from being deleted; one that is not complete, or already gone, cannot be held."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            file = (path / "COMPLETE").open("rb")
        except OSError:
            return Hold(None)
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # it is being deleted or replaced right now
                file.close()
                time.sleep(PAUSE)
                continue
            # Else there are no locks here, see above.
        with contextlib.suppress(FileNotFoundError):  # replaced between its opening and its locking?
            if os.fstat(file.fileno()).st_ino == (path / "COMPLETE").stat().st_ino:
                return Hold(file)
        file.close()
    return Hold(None)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Around the reading of a checkpoint; see `hold`."""
    kept = hold(path)
    try:
        yield
    finally:
        kept.release()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint; while this lasts nobody begins to."""
    try:
        file = (path / "COMPLETE").open("r+b")
    except FileNotFoundError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # no locks here
            yield True
            return
        yield True


def kept(steps: list[int], wish: Checkpoint, scores: Scores, reach: int = 0) -> set[int]:
    """Which of these steps stay; see `reasons`."""
    return set(reasons(steps, wish, scores, reach))


def reasons(steps: list[int], wish: Checkpoint, scores: Scores, reach: int = 0) -> dict[int, list[str]]:
    """Of these steps those that stay, and by which rules.

    "newest": the newest `keep`; "every": those of `keep_every`; "best": by `keep_best`. And where no other rule keeps
    them, "guard": of those that lie `reach` steps before the newest or more the newest, and the oldest of the others,
    which will be that one day.

    Args:
        reach: steps that a rollback may go back behind the newest.
    """
    found: dict[int, list[str]] = {step: ["newest"] for step in sorted(steps)[-wish.keep :]}
    if wish.keep_every:
        for step in steps:
            if step % wish.keep_every == 0:
                found.setdefault(step, []).append("every")
    rated = {step: scores[step][wish.keep_best] for step in steps if wish.keep_best in scores.get(step, {})}
    if rated:
        sign = 1 if wish.keep_best_mode == "max" else -1
        best = max(rated, key=lambda step: (sign * rated[step], step))  # of equals the newest
        found.setdefault(best, []).append("best")
    if reach and steps:
        old = [step for step in steps if step <= max(steps) - reach]
        for step in (max(old, default=min(steps)), min(set(steps) - set(old))):
            found.setdefault(step, ["guard"])
    return found


def prune(root: Path, wish: Checkpoint, step: int, reach: int = 0) -> list[str]:
    """Delete the checkpoints that no rule keeps, up to the one of `step`, which was just written and stays.

    Those of later steps belong to a past that was passed over as damaged; they and what interrupted saves left
    behind go too. Where the new one would be the only one left, it is first read back from the disk.

    Args:
        reach: steps that a rollback may go back behind it.

    Returns:
        What a person should know, a sentence each: what was not deleted. Training need not end for it.
    """
    folders = found(root)
    good = {step_of(path) for path in folders if (path / "COMPLETE").exists() and step_of(path) <= step}
    scores = _scores(root)
    problems = [f"{root / SCORES} is damaged: the best checkpoint so far is not known"] if scores is None else []
    stay = kept(sorted(good), wish, scores or {}, reach) | {step}
    if scores is None and wish.keep_best:  # any of them may be the best
        stay |= good
    if len(stay & good) == 1 < len(good):
        bad = damage(step_folder(root, step), afresh=True)
        if bad:
            return [*problems, f"{step_folder(root, step)} reads back wrong ({bad}): the older checkpoints stay"]
    for path in [path for path in folders if step_of(path) not in stay & good]:
        problems += _delete(path)
    for path in (*root.glob("step-*.partial"), *root.glob("step-*.replaced")):
        problems += _delete(path)
    return problems


def _delete(path: Path) -> list[str]:
    """Delete a checkpoint that nobody reads; returns what hindered it."""
    try:
        with alone(path) as unread:
            if not unread:
                return [f"{path} is being read and stays until the next save"]
            (path / "COMPLETE").unlink(missing_ok=True)  # first, so that a half-deleted folder never counts
            shutil.rmtree(path)
    except OSError as error:
        return [f"could not delete {path}: {error}"]
    return []


def read_scores(root: Path) -> Scores:
    """The scores of the steps that were evaluated; none where the file is missing or was damaged."""
    return _scores(root) or {}


def _scores(root: Path) -> Scores | None:
    """The same; None where the file was damaged."""
    try:
        content = json.loads((root / SCORES).read_text())
        rows = content["scores"]
        if _digest(rows) != content["sha256"]:
            return None
        return {int(step): {name: float(value) for name, value in row.items()} for step, row in rows.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None


def write_score(root: Path, step: int, values: dict[str, float]) -> str:
    """Note the scores of a step, for those whose checkpoints are still there; returns why it could not, or nothing."""
    there = {step_of(path) for path in found(root)}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    rows = {number: row for number, row in read_scores(root).items() if number in there} | {step: finite}
    texts = {str(number): row for number, row in sorted(rows.items())}
    aside = root / f"{SCORES}.tmp"
    try:
        write_text(aside, json.dumps({"sha256": _digest(texts), "scores": texts}, indent=1))
        os.replace(aside, root / SCORES)
        sync(root)
    except OSError as error:
        return f"{root / SCORES} could not be written ({error}): checkpoint.keep_best does not know step {step}"
    return ""


def _digest(rows: dict[str, dict[str, float]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def coming(root: Path, wish: Checkpoint) -> int:
    """Checkpoints that are still to be written before one is deleted for each that comes."""
    return max(1, wish.keep + 1 - sum((path / "COMPLETE").exists() for path in found(root)))


def forecast(root: Path, needed: int, count: int = 1) -> str:
    """A warning if the disk has no room for `count` more checkpoints of `needed` bytes each, else nothing."""
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    fit = int(free / (needed * MARGIN)) if needed else count
    if fit >= count:
        return ""
    have = f"low disk: {root} has {free / 1e9:.2f} GB free, a checkpoint takes {needed / 1e9:.2f} GB"
    if fit == 0:
        return f"{have}: the next save will fail, which ends no run before its last; free some"
    return f"{have}: room for {fit} more, but {count} come before an old one goes; free some, or lower checkpoint.keep"


def settle_replaced(final: Path) -> None:
    """Put right what a kill left while a checkpoint took the place of an older one of the same step."""
    replaced = final.with_suffix(".replaced")
    if replaced.exists() and not (final / "COMPLETE").exists():
        shutil.rmtree(final, ignore_errors=True)
        os.replace(replaced, final)
    shutil.rmtree(replaced, ignore_errors=True)


def clear(root: Path) -> None:
    """Remove what interrupted saves left behind, when a run starts; only its own first rank may call this."""
    for replaced in root.glob("step-*.replaced"):
        settle_replaced(replaced.with_suffix(""))
    for partial in root.glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
