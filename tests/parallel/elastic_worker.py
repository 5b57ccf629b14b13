"""One rank that walks several runs to their ends, some of them from another layout's checkpoint.

    python -m tests.parallel.elastic_worker CASES.json OUT        (RANK, WORLD_SIZE, MASTER_* set)

A case is a run, and where it goes on from: a run folder and the step of the checkpoint in it. The whole road is walked
as `coatnet train` does; only the process group is kept from one run to the next. A rank tells which samples each of its
steps took.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from configs import resolve
from data_pipeline.batch import Batch
from data_pipeline.stream import train_loader
from tests.parallel import cases
from tests.parallel.parity_worker import number_from_zero
from trainer import cluster, train
from trainer.health.stopping import StopFlag
from trainer.tracking.track import run_folder


def walked(case: cases.Case, base: cluster.Member, stop: StopFlag) -> dict[str, Any]:
    """One run: its exit code, and the (global index, key) of the samples that this rank took, in order."""
    run = resolve.from_json(json.dumps(case["run"]))
    folder = run_folder(run)
    if base.first and "folder" in case:
        checkpoint = f"checkpoints/step-{case['step']:08d}"
        shutil.copytree(Path(case["folder"]) / checkpoint, folder / checkpoint)
    dist.barrier(group=base.control)
    number_from_zero()
    member = cluster.in_mesh(base, run.parallel.pipeline, timedelta(seconds=run.cluster.timeout))
    taken: list[tuple[int, str]] = []

    def loader(*arguments: Any) -> Iterator[Batch]:
        """`train_loader`, which tells."""
        for batch in train_loader(*arguments):
            if member.begins:  # the last stage takes the same samples' labels
                taken.extend(zip(batch.indices_B.tolist(), batch.keys, strict=True))
            yield batch

    with ExitStack() as stack:
        for where, name, stand_in in (
            (cluster, "join", lambda run: member),
            (cluster, "leave", lambda: None),
            (train, "train_loader", loader),
        ):
            stack.enter_context(mock.patch.object(where, name, stand_in))
        code = train.train(run, stop)
    return {"code": code, "taken": taken}


if __name__ == "__main__":
    cases.walk(sys.argv[1], sys.argv[2], walked)
