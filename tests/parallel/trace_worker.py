"""One rank of runs whose operations are recorded: a few steps and an evaluation under several engines.

    pool.Job("trace_worker", ("CASES.json", "FOLDER"), ...)

The traces go to FOLDER/<case>/trace. What the dispatcher saw of the third step, a source of its own, goes to
FOLDER/<case>/seen-<rank>.json.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import norm
from tests.parallel.parity_worker import CLASSES, LOSS, evaluated, micros, number_from_zero, run_of
from trainer import cluster
from trainer.engine import engine as engine_module
from trainer.engine import network
from trainer.engine.engine import Engine
from trainer.plan import layout
from trainer.stages import recorder


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what reaches a process group, in whatever way it gets there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def steps(case: dict[str, Any], base: cluster.Member, folder: Path) -> None:
    """Three steps and an evaluation."""
    number_from_zero()
    run = run_of(case)
    run = replace(
        run,
        norm=replace(run.norm, replica_batch=case["group"]),
        parallel=replace(run.parallel, balance="parameters"),  # large weights on every stage
    )
    member = cluster.in_mesh(base, run.parallel.pipeline, timedelta(seconds=run.cluster.timeout))
    plan = layout(run, member.world)
    with reuse_distance(case.get("reuse", 1_000_000_000)):
        engine = Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
    trace = recorder.begin(run, CLASSES, folder, engine)
    seen = Seen()
    for step in range(3):
        trace.part(f"step {step + 1}")
        with seen if step == 2 else nullcontext():
            engine.forward_backward(micros(engine, run, step, False), LOSS)
            healthy = torch.isfinite(engine.update(1e-3))
            norm.commit(engine.model, member.data_group, healthy)
    trace.part("evaluation 1")
    with engine.evaluation() as forward:
        evaluated(forward, run.model.resolution)
    trace.close()
    (folder / f"seen-{member.rank}.json").write_text(json.dumps(seen.operations))


@contextmanager
def reuse_distance(elements: int) -> Iterator[None]:
    """Engines that keep a weight under ZeRO-3 when it is needed again before so many elements of others."""
    usual: Any = vars(engine_module)["deepspeed_config"]

    def changed(*arguments: Any) -> dict[str, Any]:
        config: dict[str, Any] = usual(*arguments)
        config["zero_optimization"]["stage3_max_reuse_distance"] = elements
        if elements < 1_000_000_000:
            config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0  # else it fetches all of so small a network
        return config

    with patch.object(engine_module, "deepspeed_config", changed):
        yield


def main(cases_file: str, folder: str) -> None:
    """Run every case."""
    member = cluster.join(run_of({"zero": 0}))
    torch.set_num_threads(1)
    for name, case in json.loads(Path(cases_file).read_text()).items():
        steps(case, member, Path(folder) / name)
    cluster.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
