"""A run on this machine in the background, by submitit's local executor: `coatnet submit --cluster local`.

The job is `coatnet train` itself, whose supervisor starts, watches and restarts the ranks; submitit only starts it and
keeps its output, so nothing of the run depends on a pickle or on submitit's time-outs.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from configs.errors import InputError

FOREVER = 60 * 24 * 3650  # minutes: submitit's default would end a job after two
NAME = "local"  # of the cluster that is none


class Command:
    """What submitit pickles: words, which replace the process that calls it."""

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        self.words, self.variables = words, variables

    def __call__(self) -> None:
        """Become the command: signals reach it, and its exit code is the job's."""
        own = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        os.execve(self.words[0], self.words, {**own, **self.variables})


def note(number: str) -> dict[str, object]:
    """What a run's job.json has of a process that `send` started."""
    return {"process": int(number), "host": socket.gethostname()}


def lives(told: Mapping[str, object]) -> bool:
    """Whether the process of a job.json is on this machine and has not ended: submitit's, which waits for the run."""
    if told.get("host") != socket.gethostname():
        return False
    try:
        return b"submitit" in Path(f"/proc/{told['process']}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def _away(log: Path) -> Iterator[None]:
    """Around the start of a process that is to hold neither this one's terminal nor its pipes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in range(3)]
    try:
        with open(os.devnull) as nothing, log.open("ab") as output:
            os.dup2(nothing.fileno(), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        yield
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)


def send(place: Path, arguments: list[str], code: Path) -> str:
    """Start `python -m ARGUMENTS` in the background; the process number that submitit names its files by.

    Args:
        place: folder of submitit's files and of the job's output, NUMBER_0_log.out and .err.
        arguments: module and words.
        code: where the copy of the code lies.

    Raises:
        InputError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("--cluster local needs submitit: pip install -e '.[slurm]'") from None
    path = os.pathsep.join(filter(None, (str(code.resolve()), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # submitit hides all GPUs
        variables["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    executor = submitit.AutoExecutor(folder=place, cluster=NAME)
    executor.update_parameters(timeout_min=FOREVER, tasks_per_node=1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it outlives the terminal, by inheritance
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path  # for the process that unpickles
    try:
        with _away(place / "submitit.log"):
            return str(executor.submit(Command([sys.executable, "-u", "-m", *arguments], variables)).job_id)
    finally:
        signal.signal(signal.SIGHUP, before)
        if given is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = given
