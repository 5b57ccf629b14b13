"""The command `coatnet`: finds the command by its first word and maps faults to exit codes. Never imports torch.

Exit codes: 0 done; 75 stopped on request and saved; 76 configuration or data error, do not retry; 77 diverged;
130 interrupted before anything was saved; 141 nobody reads the output any more; anything else is a crash.
"""

import importlib
import importlib.util
import os
import select
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError, unknown

BAD_INPUT = 76
CLOSED_PIPE = 141  # the shell's code for a program that wrote to a pipe without a reader
INTERRUPTED = 130  # the shell's own code for a program that Ctrl-C ended
ROOMS = ("configs", "models", "data_pipeline", "slurm", "trainer")


class Command(NamedTuple):
    """One first word of the command line and the function `(argv) -> exit code` behind it."""

    module: str
    function: str
    usage: str
    purpose: str


COMMANDS = {
    "models": Command(
        "trainer.commands.config",
        "models_command",
        "[--resolution 224|384|512] [--stride expansion|depthwise] [--json]",
        "every model's size beside the paper's",
    ),
    "config": Command(
        "trainer.commands.config",
        "config_command",
        "list | show RECIPE [--FIELD VALUE ...] | diff A B   [--json]",
        "recipes, resolved settings, differences",
    ),
    "train": Command(
        "trainer.commands.train", "train_command", "RECIPE [--FIELD VALUE ...]", "train, or continue, a run"
    ),
    "plan": Command(
        "trainer.commands.plan",
        "plan_command",
        "RECIPE --gpus N|A..B --gpu h100|... [--nodes K] [--nic 400] [--price 2.5] [--roofline] [--json]",
        "memory, time and cost of every layout before anything is started; scaling",
    ),
    "eval": Command("trainer.commands.eval", "eval_command", "RUN", "score a run's checkpoint on the held-out split"),
    "report": Command(
        "trainer.commands.report",
        "report_command",
        "RUN [RUN ...] [--out FILE] [--markdown | --card]",
        "a run's whole story on one page, or several runs compared",
    ),
    "track": Command(
        "trainer.commands.track",
        "track_command",
        "sync RUN [RUN ...] [--uri URI] [--json]",
        "carry a run's figures to MLflow and the others, where nobody did while it trained",
    ),
    "cost": Command(
        "trainer.commands.cost",
        "cost_command",
        "RUN [RUN ...] [--against ROW] [--json]",
        "what a run cost so far, beside the paper's own",
    ),
    "status": Command(
        "trainer.commands.status", "status_command", "RUN [--watch] [--json]", "what a run and its job are doing"
    ),
    "cluster": Command(
        "trainer.commands.status", "cluster_command", "init [NAME]", "write a first profile of this cluster"
    ),
    "submit": Command(
        "trainer.commands.submit",
        "submit_command",
        "RECIPE --nodes N[..M] [--cluster PROFILE] [--dry-run | --check] [--FIELD VALUE ...]",
        "train as a job of a SLURM cluster that recovers by itself",
    ),
    "logs": Command(
        "trainer.commands.jobs", "logs_command", "RUN [-f] [--rank R]", "what its supervisor and a rank say"
    ),
    "cancel": Command("trainer.commands.jobs", "cancel_command", "RUN [--now]", "have its job save and end"),
    "requeue": Command("trainer.commands.jobs", "requeue_command", "RUN", "have its job save and be queued again"),
    "trace": Command(
        "trainer.commands.trace",
        "trace_command",
        "RUN [--json]",
        "prove that a traced run's ranks cannot wait in a circle; count their bytes",
    ),
    "doctor": Command(
        "trainer.commands.doctor",
        "doctor_command",
        "[RUN] [--cluster PROFILE] | --node RUN | --links RUN   [--json]",
        "what of this machine, node or cluster will make a run fail, and what to do about it",
    ),
    "drill": Command(
        "trainer.commands.drill",
        "drill_command",
        "FAULT ... | all [--ranks N] [--out FOLDER] [--json]",
        "make faults happen to a tiny run here; how soon it is noticed and goes on",
    ),
    "checkpoint": Command(
        "trainer.commands.checkpoint",
        "checkpoint_command",
        "ls RUN | verify RUN_OR_STEP ... | diff A B | convert SOURCE --out FILE   [--json]",
        "what is saved, whether it is whole, what differs; one file of it, or of DeepSpeed's",
    ),
    "export": Command(
        "trainer.commands.weights",
        "export_command",
        "RUN [--format safetensors|timm|huggingface|mlflow] [--out PATH] [--weights raw|ema] [--step N]",
        "a run's weights as a file or folder for others",
    ),
    "import": Command(
        "trainer.commands.weights",
        "import_command",
        "FILE [--out FILE] [--head reset --classes N]",
        "timm's weights of the same design, or ours, as a file to start from",
    ),
    "bench": Command(
        "trainer.commands.bench",
        "bench_command",
        "model [NAME] [--against timm] | data [DIR] [--recipe RECIPE] | blocks RECIPE   [options]",
        "speed and memory of a training step, of the data pipeline and of single blocks on this machine",
    ),
    "data": Command(
        "trainer.commands.data",
        "data_command",
        "demo | build SOURCE --out DIR | adopt TAR ... | verify DIR | order RECIPE --step N",
        "make, take over and check data sets; say which samples a step sees",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `coatnet`; None takes the process's own.

    Returns:
        The exit code. An InputError becomes one message on stderr and 76; other exceptions propagate (a crash).
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        _check_rooms()
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"coatnet: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("coatnet: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it ends
        return CLOSED_PIPE


def _dispatch(words: list[str]) -> int:
    """Answer --help and --version, or import and call the command that the first word names."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"coatnet {_version()}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        raise unknown("command", words[0], COMMANDS)
    function: Callable[[list[str]], int] = getattr(importlib.import_module(command.module), command.function)
    return function(words[1:])


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are always reported
    return bool(poll.poll(0))


def _help() -> str:
    """The table of commands."""
    lines = ["coatnet: train CoAtNet-0..7 on large sets of pictures", ""]
    for word, command in COMMANDS.items():
        lines += [f"  coatnet {word} {command.usage}", f"      {command.purpose}"]
    lines += [
        "",
        "RECIPE is a name of `coatnet config list`, or a function in a file: ./mine.py:recipe",
        "FIELD is any setting of `coatnet config show RECIPE`, e.g. --optim.lr 8e-4 --augment.no-flip",
    ]
    return "\n".join(lines)


def _version() -> str:
    """The installed package's version."""
    try:
        return version("coatnet")
    except PackageNotFoundError:
        return "not installed"


def _check_rooms() -> None:
    """Refuse to start when another package shadows one of ours: the rooms must lie beside each other.

    Raises:
        InputError: naming the room, where it was found, and where it should be.
    """
    home = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin is not None else None
        if found != home / room:
            where = f"found at {found}" if found is not None else "not found as a package"
            raise InputError(
                f"package {room!r} must lie in {home}, beside this command, but is {where}: another folder or package "
                "of that name comes first on the import path, or the installation is damaged; start elsewhere, or mend "
                "PYTHONPATH"
            )


if __name__ == "__main__":
    sys.exit(main())
