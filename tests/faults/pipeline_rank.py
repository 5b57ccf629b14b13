"""One rank of a real run with a pipeline, in which one rank fails in its third step, or is given another configuration.

    python -m pipeline_rank FOLDER FAULT VICTIM WORD...    (RANK, WORLD_SIZE, MASTER_* set; the folder on PYTHONPATH)

WORD... change the recipe. FOLDER/failed is written as the fault happens.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import train
from trainer.commands.config import resolve_command
from trainer.stages import pipeline

STEP = 3
OTHER = {"pixels": ("--model.resolution", "64"), "samples": ("--parallel.micro-batch", "16")}


def raises() -> None:
    """An error of the program."""
    raise ArithmeticError("made to fail in a backward pass")


def killed() -> None:
    """As by the kernel, short of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail_backward(folder: Path, how: Callable[[], None]) -> None:
    """Fail in the second backward pass of the step, with micro-batches in flight."""
    backward, train_call, state = pipeline._Work.backward_of, pipeline.Pipeline.train, {"step": 0}

    def counted(self: Any, *arguments: Any) -> Tensor:
        state["step"] += 1
        return train_call(self, *arguments)

    def failing(self: Any, number: int) -> None:
        if state["step"] == STEP and number == 1:
            mark(folder)
            how()
        backward(self, number)

    pipeline.Pipeline.train, pipeline._Work.backward_of = counted, failing  # type: ignore


def narrow(folder: Path) -> None:
    """Send a column less than before, from a step on."""
    swap, state = pipeline.Pipeline.swap, {"calls": 0}

    def cut(self: Any, sends: Any, receives: Any, training: bool = True) -> list[Tensor]:
        state["calls"] += bool(sends)
        if sends and state["calls"] == 5:
            mark(folder)
            sends = [(stage, tensor[..., :-1]) for stage, tensor in sends]
        return swap(self, sends, receives, training)

    pipeline.Pipeline.swap = cut  # type: ignore[method-assign]


def mark(folder: Path) -> None:
    """Write down that it happens now."""
    (folder / "failed").write_text(str(time.time()))


def main(folder: Path, fault: str, victim: int, words: list[str]) -> None:
    """Train until the fault."""
    if int(os.environ["RANK"]) == victim:
        if fault in OTHER:
            mark(folder)
            words = [*words, *OTHER[fault]]
        elif fault == "narrow":
            narrow(folder)
        else:
            fail_backward(folder, {"raises": raises, "killed": killed}[fault])
    train.main([], resolve_command("demo-digits", words))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
