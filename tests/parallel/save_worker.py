"""One rank that trains on while a save still copies its state, under several engines, and says what came back.

    pool.Job("save_worker", ("CASES.json", "OUT"), ...)

The copy is made to begin after the next step's passes, so that all that a step changes would be in it if nothing
waited.
"""

import json
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from configs.schema import Checkpoint
from models import norm
from tests.parallel.held_worker import CLASSES, LOSS, micros, run_of
from trainer import cluster
from trainer.engine import network
from trainer.engine.engine import Engine
from trainer.plan import layout
from trainer.state import checkpoint
from trainer.state.host_memory import HostMemory
from trainer.state.saver import Saver

LATE = 0.3  # seconds after the passes, in which the update or the averages have to wait
PATIENCE = 30.0  # seconds after which the copy begins though the passes are not over: then they wait for it


def state(engine: Engine) -> dict[str, Tensor]:
    """Copies of all that a checkpoint has of a rank's tensors."""
    found = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    for part in engine.fragments(owned=False):
        for kind, tensor in {"value": part.value, **part.moments}.items():
            found[f"{part.name} {part.offset} {kind}"] = tensor.detach().clone()
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are the same, bit by bit."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def saved(case: dict[str, Any], base: cluster.Member, folder: Path) -> dict[str, Any]:
    """A save, then a step or an evaluation with averaged weights at once; what was copied, and what waited for it."""
    run = run_of(case)
    member = cluster.in_mesh(base, run.parallel.pipeline, timedelta(seconds=run.cluster.timeout))
    plan = layout(run, member.world)
    engine = Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
    saver = Saver(folder, Checkpoint(), member, asynchronous=True)
    engine.before_change = saver.settle

    def update() -> None:
        engine.update(1e-3)
        norm.commit(engine.model, member.data_group)
        assert engine.average is not None
        engine.average.update(1)

    engine.forward_backward(micros(engine, 0), LOSS)
    update()
    wanted, copy = state(engine), HostMemory.copy

    passed = threading.Event()

    def late(*arguments: Any) -> Any:
        passed.wait(PATIENCE)
        time.sleep(LATE)
        return copy(*arguments)

    with mock.patch.object(HostMemory, "copy", late):
        saver.save(1, {}, engine.fragments(owned=True), engine.buffers(), last=False)
        engine.forward_backward(micros(engine, 1), LOSS)
        beside = saver.copying
        passed.set()
        if case.get("evaluates"):
            with engine.averaged():
                while saver.copying:  # does not happen; else the copy would be of the averages
                    time.sleep(0.05)
                after = state(engine)
        else:
            update()
            after = state(engine)
        (outcome,) = saver.finished(wait=True)
    found = checkpoint.newest(folder, member)
    assert found is not None
    checkpoint.restore(found, engine.fragments(owned=False), engine.buffers())
    return {
        "problem": outcome.problem,
        "stall": outcome.stall,
        "beside": beside,
        "changed": not equal(after, wanted),
        "same": equal(state(engine), wanted),
    }


def main(cases_file: str, out_file: str) -> None:
    """Run every case and let each rank write what it saw."""
    member = cluster.join(run_of({}))
    torch.set_num_threads(1)
    answers = {
        name: saved(case, member, Path(f"{out_file}-{name}"))
        for name, case in json.loads(Path(cases_file).read_text()).items()
    }
    Path(f"{out_file}.{member.rank}").write_text(json.dumps(answers))
    cluster.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
