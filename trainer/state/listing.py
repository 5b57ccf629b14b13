"""What lies in a run's folder of checkpoints: a row for each, and what is wrong with its files."""

import json
import time
from pathlib import Path
from typing import Any

from configs import resolve
from configs.errors import InputError
from trainer.state import retention
from trainer.state.durable import manifest_files, verify


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each checkpoint of a run folder, the oldest first. Reads no tensors.

    Returns:
        path, step, saved (unix time), bytes, files; ranks, pipeline and zero of the layout that wrote it; scores;
        kept: the rules of retention by which it stays; problem: what is wrong with its manifest, empty if nothing is.

    Raises:
        InputError: no run folder.
    """
    run, root = resolve.recorded(folder / "run.json"), folder / "checkpoints"
    scores = retention.read_scores(root)
    complete = [retention.step_of(path) for path in retention.found(root) if (path / "COMPLETE").exists()]
    stay = retention.reasons(complete, run.checkpoint, scores, run.guard.reach)
    found = []
    for path in sorted([*retention.found(root), *root.glob("step-*.partial")]):
        step = retention.step_of(path)
        row = _row(path) | {"step": step, "scores": scores.get(step, {})}
        found.append(row | {"kept": stay.get(step, []) if not row["problem"] else []})
    return found


def _row(path: Path) -> dict[str, Any]:
    """What one folder says of itself."""
    files = manifest_files(path)
    row: dict[str, Any] = {"path": str(path), "saved": None, "bytes": 0, "files": 0, "problem": ""}
    row |= {"ranks": None, "pipeline": None, "zero": None}
    if path.suffix:
        return row | {"problem": "is being written, or was when its run ended"}
    if isinstance(files, str):
        return row | {"problem": files}
    try:
        state = json.loads((path / "state.json").read_text())
        row |= {"ranks": state["world"], **{name: state["run"]["parallel"][name] for name in ("pipeline", "zero")}}
        row["saved"] = (path / "COMPLETE").stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError) as error:
        row["problem"] = f"state.json cannot be read ({type(error).__name__}: {error})"
    return row | {"bytes": sum(size for size, _ in files.values()), "files": len(files)}


def targets(path: Path) -> list[Path]:
    """The checkpoints that a path means: itself, or the complete ones of a run folder, the oldest first.

    Raises:
        InputError: it is neither, or there is none.
    """
    if (path / "run.json").is_file():
        found = [folder for folder in retention.found(path / "checkpoints") if (folder / "COMPLETE").exists()]
        if not found:
            raise InputError(f"{path}/checkpoints: no complete checkpoint; `coatnet train` writes them")
        return found[::-1]
    if path.name.startswith("step-") and path.is_dir():
        return [path]
    raise InputError(f"{path}: neither a run folder nor a checkpoint's; nearest valid: runs/NAME/checkpoints/step-N")


def verified(path: Path) -> dict[str, Any]:
    """Every byte of a checkpoint read: path, files, bytes, seconds, and damage, one sentence for each bad file."""
    began = time.perf_counter()
    files = manifest_files(path)
    listed = {} if isinstance(files, str) else files
    bad = [files] if isinstance(files, str) else []
    with retention.held(path):
        bad += filter(None, (verify(path / name, *facts) for name, facts in sorted(listed.items())))
    return {
        "path": str(path),
        "files": len(listed),
        "bytes": sum(size for size, _ in listed.values()),
        "seconds": time.perf_counter() - began,
        "damage": bad,
    }
