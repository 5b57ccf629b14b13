"""The line a person watches while a run goes on."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressLine:
    """Loss, images per second and time to go: a live line on a terminal, plain lines elsewhere. First rank only."""

    def __init__(self, name: str, steps: int, shown: bool) -> None:
        self._shown, self._name, self._steps = shown, name, steps
        self._console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._first, self._started = 0, time.perf_counter()
        self._live: Progress | None = None
        self._task = TaskID(0)
        if shown and self._console.is_terminal:
            columns = (TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("starting", total=steps)
            self._live.start()

    def start(self, step: int) -> None:
        """Begin counting at `step`."""
        self._first, self._started = step, time.perf_counter()
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Bring the line up to date."""
        if not self._shown:
            return
        gone = time.perf_counter() - self._started
        left = gone / max(1, step - self._first) * (self._steps - step)
        loss = f"{values['train/loss']:.4f}" if "train/loss" in values else "not finite"
        text = (
            f"step {step}/{self._steps}  loss {loss}  "
            f"{values['perf/images_per_second']:.1f} images/s  ETA {clock(left)}"
        )
        if self._live is not None:
            self._live.update(self._task, completed=step, description=text)
        else:
            self._console.print(f"{self._name}  {text}")

    def say(self, text: str) -> None:
        """Print lines above the live one."""
        if self._shown:
            (self._live.console if self._live is not None else self._console).print(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{days}d {text}" if days else text
