"""`coatnet track sync`: carries what a run wrote to MLflow and the others, where nobody did it while it trained."""

import json
import subprocess
import sys
from pathlib import Path

from configs import resolve
from configs.errors import InputError, unknown
from trainer.commands.config import Arguments
from trainer.launch import with_rooms
from trainer.tracking.destination import Position
from trainer.tracking.track import DESTINATIONS, check_sinks, tracking_uri, wanted

TRACK_USAGE = """usage: coatnet track sync RUN [RUN ...] [--uri URI] [--json]

Carries the lines of a run's metrics.jsonl, what its machines wrote about themselves, and its small files to the
destinations that the run names (MLflow, TensorBoard, W&B offline), from where each of them stands: after a run on nodes
that reach no server, after a server that was down, or to another server. What is there already is not sent twice.
A run that trains now is carried by a process of its own and is left to it.

--uri URI  send to this MLflow instead of the run's own (tracking.uri, MLFLOW_TRACKING_URI, or runs/mlflow.db), from
           the first line on if it does not know the run
--json     how far each destination has got, for programs

exit codes: 0 all of it is there; 1 some destination did not take everything; 75 another process carries it now"""


def track_command(arguments: list[str]) -> int:
    """`coatnet track sync RUN ...`: returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(TRACK_USAGE)
        return 0
    if arguments[0] != "sync":
        raise unknown("action of `coatnet track`", arguments[0], ("sync",))
    parser = Arguments("track sync", "Carries what a run wrote to MLflow and the others.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--uri", default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_strict(arguments[1:])
    for folder in options.runs:
        if not (folder / "run.json").exists():
            raise InputError(f"{folder}: not a run folder (it has no run.json); `coatnet train` makes them under runs/")
        check_sinks(resolve.recorded(folder / "run.json"))
    codes = [sync(folder, options.uri) for folder in options.runs]
    states = {str(folder): state(folder) for folder in options.runs}
    if options.json:
        print(json.dumps(states, indent=1))
    else:
        print("\n".join(line for folder in options.runs for line in told(folder, states[str(folder)], options.uri)))
    return max(codes)


def sync(folder: Path, uri: str = "") -> int:
    """Carry one run's lines; returns the exit code of `trainer.tracking.carry`."""
    words = [sys.executable, "-m", "trainer.tracking.carry", str(folder), *(["--uri", uri] if uri else [])]
    return subprocess.run(words, env=with_rooms(), check=False).returncode


def state(folder: Path) -> dict[str, dict[str, int | bool]]:
    """How many lines each destination of a run has, of how many."""
    metrics = folder / "metrics.jsonl"
    data = metrics.read_bytes() if metrics.exists() else b""
    found: dict[str, dict[str, int | bool]] = {}
    for name in wanted(resolve.recorded(folder / "run.json")):
        position = Position(folder, name)
        whole = position.finished == len(data)
        found[name] = {"lines": position.mark.lines, "of": data.count(b"\n"), "whole": whole}
    return found


def told(folder: Path, found: dict[str, dict[str, int | bool]], uri: str) -> list[str]:
    """The same for a person."""
    lines = []
    for name, one in found.items():
        where = f" at {uri or tracking_uri(resolve.recorded(folder / 'run.json'))}" if name == "mlflow" else ""
        rest = "" if one["whole"] else "; not closed, the same command goes on"
        lines.append(f"{folder}: {DESTINATIONS[name]}{where} has {one['lines']} of {one['of']} lines{rest}")
    return lines or [f"{folder}: names no destination (tracking.mlflow, tracking.tensorboard, tracking.wandb)"]
