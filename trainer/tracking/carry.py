"""Carries a run's lines to every destination it names: `python -m trainer.tracking.carry RUN [--follow] [--uri URI]`.

Each destination has a thread and a position of its own: one that fails or hangs neither stops nor delays the others.
A failed one is opened again from its position every half minute, and a last time when the run has ended.
"""

import fcntl
import os
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from configs import resolve
from configs.schema import Run
from trainer.tracking.destination import SYSTEM, Destination, Mark, Position, SystemDestination, unread
from trainer.tracking.track import DESTINATIONS, wanted

POLL = 2.0  # seconds between two looks at the file
BUSY = 75  # exit code: the same command may do later
RETRY = 30.0  # seconds until a failed destination is tried again


def open_destination(name: str, folder: Path, run: Run, position: Position) -> Destination:
    """The writer of a destination; its library is imported here and nowhere else."""
    if name == "mlflow":
        from trainer.tracking.mlflow_writer import MlflowWriter

        return MlflowWriter(folder, run, position)
    if name == "tensorboard":
        from trainer.tracking.tensorboard_writer import TensorBoardWriter

        return TensorBoardWriter(folder, run, position)
    assert name == "wandb", name
    from trainer.tracking.wandb_writer import WandbWriter

    return WandbWriter(folder, run, position)


def carry(name: str, folder: Path, run: Run, ended: threading.Event) -> bool:
    """Carry a run folder's lines to one destination until `ended`; whether it has everything then."""
    said = ""
    while True:
        last = ended.is_set()
        try:
            _session(name, folder, run, ended)
            return True
        except Exception:  # whatever a library or a server may throw must not reach the other destinations
            problem = traceback.format_exc()
        if problem != said:  # once as long as it stays the same
            sys.stderr.write(f"{name}: will be tried again from where it stands\n{problem}")
            said = problem
        if last:
            return False
        ended.wait(RETRY)


def _session(name: str, folder: Path, run: Run, ended: threading.Event) -> None:
    """One destination from its opening to its end."""
    position = Position(folder, name)
    destination = open_destination(name, folder, run, position)
    mark, last = destination.start, False
    while not last:
        last = ended.is_set()  # before the look, so that nothing written before the end is missed
        lines, upto = unread(folder / "metrics.jsonl", mark)
        if lines:
            destination.take(lines, upto)
            mark = upto
        if isinstance(destination, SystemDestination):
            _system(destination, folder, position)
        if not last:
            ended.wait(POLL)
    destination.finish(mark)
    position.finish()


def _system(destination: SystemDestination, folder: Path, position: Position) -> None:
    """Hand on what the machines of the run have written since the last look."""
    for file in sorted((folder / SYSTEM).glob("*.jsonl")):
        marks = {host: Mark(*place) for host, place in position.own.get("system", {}).items()}
        lines, upto = unread(file, marks.get(file.stem, Mark()))
        if lines:
            destination.take_system(file.stem, lines, marks | {file.stem: upto})


def main(arguments: list[str]) -> int:
    """Carry once, or with --follow until standard input ends, which it does when the run ends, however it ends.

    Returns:
        0, 1 when some destination did not take everything, or `BUSY`.
    """
    folder, follow = Path(arguments[0]), "--follow" in arguments[1:]
    os.nice(10)  # the training comes first
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of one call; the whole is tried again anyway
    run = resolve.recorded(folder / "run.json")
    if "--uri" in arguments[1:]:
        run = replace(run, tracking=replace(run.tracking, uri=arguments[arguments.index("--uri") + 1]))
    ended = threading.Event()
    if not wanted(run):
        return 0
    lock = alone(folder, patient=follow)
    if lock is None:
        sys.stderr.write(f"{folder}: another process carries this run's lines; it is left to it\n")
        return BUSY
    if follow:
        # A stop request is for the ranks: their last figures come after it.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    else:
        ended.set()
    with ThreadPoolExecutor(max_workers=len(DESTINATIONS)) as threads:
        results = [threads.submit(carry, name, folder, run, ended) for name in wanted(run)]
        if follow:
            sys.stdin.read()
            ended.set()
    os.close(lock)
    return 0 if all(result.result() for result in results) else 1


def alone(folder: Path, patient: bool) -> int | None:
    """Hold the positions of a run alone: two that carry the same lines would write over each other's.

    Args:
        patient: wait while another one holds them.

    Returns:
        The lock's file descriptor; None: another process holds it.
    """
    (folder / "carried").mkdir(exist_ok=True)
    descriptor = os.open(folder / "carried" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
