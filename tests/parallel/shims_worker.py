"""One rank that shows what DeepSpeed does without a part of `trainer.engine.deepspeed_shims`, and with it.

pool.Job("shims_worker", ("OUT",), world=2, ...)
"""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.parallel.parity_worker import CLASSES, run_of
from trainer import cluster
from trainer.engine import deepspeed_shims as shims
from trainer.engine import network
from trainer.engine.engine import Engine
from trainer.engine.mesh import Mesh
from trainer.plan import layout


def refused(check: Any, numbers: list[int]) -> bool:
    """Whether a check of numbers over ranks refuses them. A collective call."""
    try:
        check(numbers)
    except RuntimeError:
        return True
    return False


def orders(member: cluster.Member) -> dict[str, bool]:
    """Who refuses orders of modules that differ between stages, or between replicas."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks as theirs

    empty = torch.nn.Module()
    staged = cluster.in_mesh(member, 2, timedelta(seconds=60))
    found = {"theirs, stages": refused(theirs, [1, 2, 3 + member.rank])}
    shims.enter_mesh(staged, empty)
    found["ours, stages"] = refused(coordinator.assert_ints_same_as_other_ranks, [1, 2, 3 + member.rank])
    shims.enter_mesh(cluster.in_mesh(member, 1, timedelta(seconds=60)), empty)
    found["ours, replicas"] = refused(coordinator.assert_ints_same_as_other_ranks, [1, 2, 3 + member.rank])
    found["ours, equal"] = refused(coordinator.assert_ints_same_as_other_ranks, [1, 2, 3])
    return found


def replicas(member: cluster.Member) -> dict[str, int]:
    """Replicas that DeepSpeed sees after an engine with a pipeline: with what that left behind, and without."""
    from deepspeed.utils import groups

    groups.mpu = Mesh(cluster.in_mesh(member, 2, timedelta(seconds=60)))
    left = groups._get_data_parallel_world_size()
    shims.enter_mesh(cluster.in_mesh(member, 1, timedelta(seconds=60)), torch.nn.Module())
    return {"left behind": left, "begun": groups._get_data_parallel_world_size()}


def main(out: str) -> None:
    """Make an engine, so that DeepSpeed is set up; then look."""
    run = run_of({"zero": 1, "size": 32})
    run = replace(run, norm=replace(run.norm, replica_batch=8))
    member = cluster.join(run)
    plan = layout(run, member.world)
    Engine(network.in_layout(run, CLASSES, plan, member), run, plan, member)
    found = {"orders": orders(member), "replicas": replicas(member)}
    Path(f"{out}.{member.rank}").write_text(json.dumps(found))
    cluster.leave()
