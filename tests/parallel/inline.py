"""Runs of one rank in this process, one after the other, which has its libraries and CUDA's from the first on.

A start of the trainer takes ten seconds on a GPU, most of it libraries: of thirty short runs on a machine that is lent
by the minute, nearly all of the time. Between two runs the device's memory is given back. Batches are all loaded before
the first step, in place of loader processes, so that a step finds its data there as in a long run.
"""

import gc
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from configs import resolve
from data_pipeline.stream import train_loader
from tests.parallel import planned_rank
from trainer import cluster, train
from trainer.health.stopping import StopFlag
from trainer.launch import rank_environment


def start(arguments: Sequence[str], world: int, logs: Path, port: int, on_cpu: bool) -> int:
    """Do what `python -m ARGUMENTS` would as the one rank, see `trainer.launch.launch`; returns the exit code."""
    if world != 1:
        raise ValueError(f"{world} ranks: this process is one")
    os.environ.update(rank_environment(1, port, on_cpu, {}) | {"RANK": "0", "LOCAL_RANK": "0"})
    module, path = arguments
    began = time.monotonic()
    gc.collect()
    if not on_cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as changed:
        # DeepSpeed goes on with the process group that it has met first: it stays.
        changed.enter_context(patch.object(cluster, "leave", lambda: None))
        if dist.is_initialized():
            changed.enter_context(patch.object(dist, "init_process_group"))
        changed.enter_context(patch.object(train, "train_loader", lambda *words: iter(list(train_loader(*words)))))
        if module == "tests.parallel.planned_rank":
            changed.enter_context(patch.object(train, "train_step", planned_rank.Watch(Path(path)).step))
        run = resolve.recorded(Path(path))
        # No trace: what torch's profiler leaves behind makes every later start of a kernel slower.
        quiet = replace(run, profile_trace=False, data=replace(run.data, workers=0))
        code = train.train(quiet, StopFlag())
    print(f"  {module} {path}: exit code {code} after {time.monotonic() - began:.1f} s", flush=True)
    return code
