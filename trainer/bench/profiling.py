"""`--profile FROM:TO`: where the time and the memory of some steps of a run go, written into its folder.

    profile/rank-00000.json         of every rank: each block's seconds (medians of the steps) and the roofline's, the
                                    steps, the peak of memory
    profile/blocks.txt              the same as a table, of the first rank
    profile/trace-rank-00000.json   what torch's profiler saw of the last two of these steps, for chrome://tracing or
                                    ui.perfetto.dev; of the first replica of each stage
    profile/memory-rank-00000.pickle  on a GPU: torch's snapshot of its memory, for pytorch.org/memory_viz
    profile/memory-rank-00000.json  on a CPU, where torch keeps no history: what the trace's allocations add up to, the
                                    peak and which operations had allocated it, beside the process's own size

The trace and the memory only where `profile_trace` is on, which it is unless a run says otherwise. Blocks are timed in
the steps that are not traced, unless there are only two: the profiler makes every operation slower.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from configs.schema import Run
from models.coatnet import CoAtNet
from trainer import cluster
from trainer.bench import allocations
from trainer.bench.block_times import BlockTimes, Seconds
from trainer.engine.engine import Engine
from trainer.planning import beside
from trainer.tracking.meter import peak_bytes

FOLDER = "profile"
TRACED = 2  # steps that the profiler watches; the last ones, so that its own memory is in no peak


def wanted(run: Run) -> tuple[int, int] | None:
    """The steps [first, last] that are profiled, counted from 1; None: none."""
    if not run.profile:
        return None
    before, last = map(int, run.profile.split(":"))
    return before + 1, last


class Profile:
    """The profile of one rank.

    Args:
        run: with `profile` set.
        classes: outputs of the classifier.
        folder: the run's.
        engine: whose steps are watched.
        base: bytes of this rank before it built anything.
    """

    def __init__(self, run: Run, classes: int, folder: Path, engine: Engine, base: int) -> None:
        steps = wanted(run)
        assert steps is not None, "a run without a profile has none"
        assert isinstance(engine.model, CoAtNet)
        self.first, self.last = steps
        # Of a run without a trace no step is a traced one.
        self._traced_from = max(self.first, self.last - TRACED + 1) if run.profile_trace else self.last + 1
        self._peak = 0
        self._run, self._classes, self._engine, self._base = run, classes, engine, base
        self._folder = folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        member = engine.member
        self._name = f"rank-{member.rank:05d}"
        self._traces = member.replica == 0
        self._cuda = member.device.type == "cuda"
        self._times = BlockTimes(engine.model, member.device)
        self._seconds: dict[int, Seconds] = {}
        self._steps: dict[int, tuple[float, float]] = {}  # by the clock, and that this thread had a core
        self._call = engine.blocks
        self._profiler: Any = None
        self._tracing = self._finished = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the optimizer step of this number. A run that goes on among these steps looks into what is left."""
        if self._finished or not self.first <= number <= self.last:
            yield
            return
        if not self._steps:
            self._engine.blocks = self._times.around(self._call)
        if number >= self._traced_from and not self._tracing:
            self._tracing = True
            self._peak = peak_bytes(self._engine.member.device)
            self._begin_trace()
        began, busy = time.perf_counter(), time.thread_time()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self._steps[number] = time.perf_counter() - began, time.thread_time() - busy
        seconds = self._times.take()
        self._seconds[number] = seconds
        if number == self.last:
            self._end_trace()
            self._finish()

    def close(self) -> None:
        """The run is over: write what there is if it ended before the last of these steps."""
        if self._profiler is not None:
            self._end_trace()
        if self._steps and max(self._steps) < self.last:
            self._finish()

    def _begin_trace(self) -> None:
        """Let the profiler watch, and on a GPU the allocator remember."""
        if not self._traces:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            # Else the driver's tracing stays on, and every step that follows starts its kernels more slowly.
            os.environ.setdefault("TEARDOWN_CUPTI", "1")
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profiler = torch.profiler.profile(activities=kinds, profile_memory=True)
        self._profiler.__enter__()

    def _end_trace(self) -> None:
        """Write the trace and the snapshot."""
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        path = self._folder / f"trace-{self._name}.json"
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        if self._cuda:
            memory: Any = torch.cuda.memory
            memory._dump_snapshot(str(self._folder / f"memory-{self._name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            found = allocations.summary(path) | {"process_peak_bytes": peak_bytes(self._engine.member.device)}
            (self._folder / f"memory-{self._name}.json").write_text(json.dumps(found, indent=1) + "\n")

    def _finish(self) -> None:
        """Write what was measured, and go out of the way."""
        self._finished = True
        self._engine.blocks = self._call
        self._times.close()
        if not self._seconds:
            return
        plain = [seconds for number, seconds in self._seconds.items() if number < self._traced_from]
        engine, steps = self._engine, plain or list(self._seconds.values())  # of few steps the traced ones must do
        passes = engine.layout.accumulation
        blocks = {name: [median(step[name][way] for step in steps) / passes for way in (0, 1)] for name in steps[0]}
        member = engine.member
        machines = beside.machines_of(member.device_name, member.world, cluster.local_world())
        expected = beside.blocks(self._run, self._classes, engine.layout, member.stage, machines)
        found = {
            "rank": engine.member.rank,
            "steps": {number: list(pair) for number, pair in self._steps.items()},
            "traced": [number for number in self._steps if number >= self._traced_from],
            "blocks": blocks,
            "roofline": expected.seconds,
            "rates": expected.origin,
            "peak_bytes": self._peak or peak_bytes(member.device),
            "base_bytes": self._base,
        }
        (self._folder / f"{self._name}.json").write_text(json.dumps(found, indent=1) + "\n")
        if engine.member.first:
            (self._folder / "blocks.txt").write_text(beside.block_table(blocks, expected) + "\n")
