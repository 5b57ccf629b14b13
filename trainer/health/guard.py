"""Watches a run: collects what its steps leave, shares it between the ranks, and says what is to be done.

What a step leaves stays on the device until it is done there: on a GPU a copy is started, and read after the next
step; on a CPU it is there at once. Then all ranks exchange their numbers in the background, while the next step
computes. So a verdict comes one step late on a CPU and two on a GPU (`Guard.delay`). Before a save or an evaluation
the guard catches up: no state is saved that was not judged. What must not wait so long, an update from a loss or a
gradient that is not finite, or from a loss above its limit where the policy is to skip, is held back on the device
(`trainer/engine/gate.py`). All ranks have the same numbers, so they all decide the same.
"""

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Run
from data_pipeline.batch import Batch
from models.coatnet import CoAtNet
from trainer.engine.engine import Engine
from trainer.health import evidence
from trainer.health.evidence import SHOWN, Measured, Probes, Stopwatch
from trainer.health.judge import NOT_COMPARED, Judge, Limits, Row, Verdict
from trainer.state.skips import Skipped
from trainer.step import StepResult

Action = Literal["continue", "skip", "rollback", "stop"]

_KEPT = 3  # steps whose batches and rows are still there when something is found to be wrong with them


@dataclass
class _Watched:
    """A step whose numbers are on their way."""

    step: int
    limits: Limits
    numbers: Tensor  # (6,) float64 in the host's memory: of Row, from loss to buffers
    arrived: Any  # the event after which they are; None: they are
    measured: Measured
    waited: float
    wall: float

    def row(self) -> Row:
        """The numbers, waited for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, healthy, block, parameters, buffers = self.numbers.tolist()
        compute = evidence.read(self.measured)
        return Row(self.step, loss, norm, healthy, block, parameters, buffers, compute, self.waited, self.wall)


class _Exchange(NamedTuple):
    """An exchange of rows under way."""

    watched: _Watched
    work: dist.Work
    rows: list[Tensor]


class Guard:
    """The guard of one run on one rank. All ranks make the same calls.

    Attributes:
        wish: its settings.
        skipped: batches of data that the run leaves out.
        delay: steps from a step to the verdict on it.
    """

    def __init__(self, run: Run, engine: Engine) -> None:
        assert isinstance(engine.model, CoAtNet)
        self.wish, self.skipped = run.guard, Skipped()
        self._run, self._engine, self._member = run, engine, engine.member
        self._probes = Probes(engine.model, self._member.device)
        self._stopwatch = Stopwatch(engine.model, self._member.device, run.parallel.compile)
        self._judge = Judge(run.guard, self._member.replicas, self._stopwatch.noise)
        self._lag = 1 if self._member.device.type == "cuda" else 0
        self.delay = 1 + self._lag
        self._queue: deque[_Watched] = deque()
        self._exchange: _Exchange | None = None
        self._batches: dict[int, list[Batch]] = {}
        self._rows: dict[int, list[Row]] = {}
        self._used: dict[str, list[int]] = {}  # steps in which a kind's policy was carried out
        self._mark: float | None = None

    def begin(self) -> Limits:
        """The limits of the step that begins."""
        if self._mark is None:
            self._mark = time.perf_counter()
        self._stopwatch.restart()
        return self._judge.limits()

    def gate(self, limits: Limits) -> float:
        """The loss above which the step that begins makes no update."""
        return limits.loss if self.wish.spike == "skip" else math.inf

    def take(self, step: int, result: StepResult, limits: Limits) -> None:
        """Take in what a step left; does not wait for the device.

        Args:
            step: updates made with it.
            limits: what `begin` said.
        """
        device = self._member.device
        sums: list[Tensor] = [torch.full((), NOT_COMPARED, device=device)] * 2
        if self._member.replicas > 1 and self.wish.drift_every and step % self.wish.drift_every == 0:
            sums = [evidence.checksum(tensors, device) for tensors in evidence.replicated(self._engine)]
        parts = [result.loss, result.grad_norm, result.healthy, self._probes.take(), *sums]
        numbers, arrived = torch.stack([part.double() for part in parts]), None
        if device.type == "cuda":
            host = torch.empty(len(parts), dtype=torch.float64, pin_memory=True)
            numbers, arrived = host.copy_(numbers, non_blocking=True), torch.cuda.current_stream().record_event()
        now, before = time.perf_counter(), self._mark
        assert before is not None, "begin comes first"
        self._mark = now
        measured = self._stopwatch.take(result.computed)
        self._queue.append(_Watched(step, limits, numbers, arrived, measured, result.waited, now - before))
        self._batches[step] = result.batches
        self._batches.pop(step - _KEPT, None)

    def verdicts(self, settle: bool) -> list[Verdict]:
        """Verdicts that are due. A collective call, once per step.

        Args:
            settle: catch up with the last step; something else than a step follows.
        """
        found = self._finish()
        if len(self._queue) > self._lag:
            self._start()
        while settle and (self._queue or self._exchange):
            found += self._finish()
            if self._queue:
                self._start()
        if settle:
            self._mark = None
        return found

    def _start(self) -> None:
        """Begin to exchange the oldest step's numbers."""
        watched = self._queue.popleft()
        mine = torch.tensor(watched.row(), dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self._member.world)]
        work = dist.all_gather(rows, mine, group=self._member.control, async_op=True)
        assert work is not None
        self._exchange = _Exchange(watched, work, rows)

    def _finish(self) -> list[Verdict]:
        """Judge the step whose numbers are being exchanged."""
        if self._exchange is None:
            return []
        (watched, work, tensors), self._exchange = self._exchange, None
        work.wait()
        rows = [Row(*tensor.tolist()) for tensor in tensors]
        self._rows[watched.step] = rows  # before a save two steps are judged at once
        self._rows.pop(watched.step - _KEPT, None)
        return self._judge.judge(rows, watched.limits)

    def close(self) -> None:
        """Complete the exchange under way, before the process group is left or the past is changed."""
        if self._exchange is not None:
            self._exchange.work.wait()
        self._exchange, self._mark = None, None
        self._queue.clear()
        self._batches.clear()
        self._rows.clear()

    def decide(self, verdict: Verdict) -> tuple[Action, str]:
        """What is to be done, and why it is not what the run asks for, if so."""
        wanted: Action = getattr(self.wish, verdict.kind)
        if wanted not in ("skip", "rollback"):
            return wanted, ""
        used = [step for step in self._used.get(verdict.kind, []) if step > verdict.step - self.wish.budget_steps]
        self._used[verdict.kind] = used
        if len(used) >= self.wish.budget:
            return "stop", f"its budget of {self.wish.budget} in {self.wish.budget_steps} steps is used up"
        used.append(verdict.step)
        return wanted, ""

    def facts(self, verdict: Verdict) -> dict[str, Any]:
        """What an event says of whose fault it is: ranks, block, samples or tensors. A collective call."""
        facts: dict[str, Any] = {"rank": list(verdict.ranks)}
        if verdict.kind == "slow_rank":  # the supervisor may leave its node out
            return facts | {"times": verdict.value / verdict.threshold * self.wish.slow_factor}
        if verdict.kind == "drift":
            return facts | {"tensors": evidence.differing(self._engine)}
        if verdict.kind not in ("nonfinite", "spike", "explosion"):
            return facts
        batches = self._batches.get(verdict.step, [])
        keys = [key for batch in batches for key in batch.keys]
        facts["batch"] = self.skipped.batch(verdict.step - 1)
        if verdict.kind == "nonfinite":
            origin = evidence.gathered(evidence.replay(self._engine, self._run, batches), self._member)
            found = [culprit for culprit in origin if culprit is not None]
            if found:
                return facts | self._reproduced(origin, min(culprit[:2] for culprit in found))
            facts |= self._from_gradients(self._rows[verdict.step])
        every = evidence.gathered(keys, self._member)
        replicas = {rank % self._member.replicas for rank in facts["rank"]} or set(range(self._member.replicas))
        return facts | _shown(
            [key for rank, keys in enumerate(every) if rank % self._member.replicas in replicas for key in keys]
        )

    def _reproduced(self, every: list[evidence.Culprit | None], first: tuple[int, int]) -> dict[str, Any]:
        """What a replay found where it first went wrong, by (stage, block)."""
        ranks = [rank for rank, culprit in enumerate(every) if culprit is not None and culprit[:2] == first]
        replicas = {rank % self._member.replicas for rank in ranks}
        near = [
            found for rank, found in enumerate(every) if found is not None and rank % self._member.replicas in replicas
        ]
        block = next(found.block for found in near if found[:2] == first)
        return {"rank": ranks, "block": block, "replayed": True} | _shown([key for found in near for key in found.keys])

    def _from_gradients(self, rows: list[Row]) -> dict[str, Any]:
        """Where the gradient went wrong on its way back, for what a replay does not show."""
        stages = [rank // self._member.replicas for rank in range(len(rows))]
        places = [(stages[rank], int(row.block)) for rank, row in enumerate(rows) if row.block]
        if not places:
            return {"block": None, "replayed": False}
        worst = max(places)
        ranks = [rank for rank, row in enumerate(rows) if (stages[rank], int(row.block)) == worst]
        here = self._probes.name(worst[1]) if self._member.rank == ranks[0] else ""
        return {"rank": ranks, "block": evidence.gathered(here, self._member)[ranks[0]], "replayed": False}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"judge": self._judge.state(), "used": self._used, "skipped": self.skipped.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; one without a guard's state knows nothing."""
        self._judge.restore(state.get("judge", {}))
        self._used = {kind: list(steps) for kind, steps in state.get("used", {}).items()}
        self.skipped = Skipped(state.get("skipped", []))

    def rewind(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint's past, but keep in mind what was learnt since: budgets and skipped batches."""
        self.close()
        self._judge.restore(state.get("judge", {}))


def _shown(keys: list[str]) -> dict[str, Any]:
    """Sample keys, each once, as an event shows them: the first ones, and how many there are."""
    unique = list(dict.fromkeys(keys))
    return {"samples": unique[:SHOWN], "samples_total": len(unique)}
