"""The line a person watches while a run goes on."""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from configs.duration import clock
from trainer.cost.statement import amount
from trainer.tracking.live import sparkline, speed

KEPT = 400  # losses of the curve in the live line
CURVE = 16  # its characters


class ProgressLine:
    """Loss, speed, goodput, cost so far and time to go: a live line on a terminal, plain lines elsewhere.

    First rank only.
    """

    def __init__(self, name: str, steps: int, shown: bool, currency: str = "") -> None:
        self._shown, self._name, self._steps, self._currency = shown, name, steps, currency
        self._losses: deque[float] = deque(maxlen=KEPT)
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
        self._losses.append(values.get("train/loss", math.nan))
        curve = f" {sparkline(self._losses, CURVE)}" if self._live is not None and len(self._losses) > 2 else ""
        rates = speed(values["perf/images_per_second"], values.get("perf/mfu"), values.get("perf/goodput"))
        cost = values.get("cost/money")
        spent = f"  {amount(cost)} {self._currency}" if cost is not None else ""
        text = f"step {step}/{self._steps}  loss {loss}{curve}  {rates}{spent}  ETA {clock(left)}"
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
