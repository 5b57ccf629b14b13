"""One rank that weighs what it holds: the live tensors of a few steps under several engines.

    pool.Job("held_worker", ("CASES.json", "OUT"), ...)

Nothing is computed from sizes of the model: storages that exist are counted, each once, under the first name that has
it. What Python has made since the engine's beginning and can still reach is "rest", so that nothing large can hide.
"""

import gc
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from configs.schema import Cluster, Data, Model, Norm, Optim, Parallel, Precision, Run
from models import norm
from models.coatnet import CoAtNet
from models.drop_path import scales
from trainer import cluster
from trainer.bench.held_bytes import Storages
from trainer.engine import network
from trainer.engine.deepspeed_shims import Cutter
from trainer.engine.engine import Engine
from trainer.engine.loss import loss_function
from trainer.plan import Layout, layout
from trainer.planning import fit
from trainer.stages import partition
from trainer.stages.pipeline import Micro

CLASSES, SIZE, BATCH, STEPS = 7, 32, 16, 2
LOSS = loss_function("softmax")


def run_of(case: dict[str, Any]) -> Run:
    """The run of one case."""
    return replace(
        Run(recipe="held", seed=3),
        model=Model(name="coatnet-nano", resolution=SIZE, drop_path=0.1),
        norm=Norm(replica_batch=case.get("micro_batch", 2)),
        data=Data(global_batch=BATCH),
        optim=Optim(lr=1e-3, schedule="constant", warmup_steps=0, epochs=1, steps=STEPS, ema=case.get("ema", 0.9)),
        parallel=Parallel(
            zero=case.get("zero", 0),
            pipeline=case.get("pipeline", 1),
            micro_batch=case.get("micro_batch", 2),
            recompute=case.get("recompute", "none"),
            balance=case.get("balance", "compute"),
        ),
        precision=Precision(dtype=case.get("dtype", "fp32")),
        cluster=Cluster(device="cpu", timeout=120),
    )


def storages(tensors: Iterable[Any], device: str = "cpu") -> dict[int, int]:
    """Bytes of the distinct storages behind those tensors that are on this kind of device, by address."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type == device and tensor.untyped_storage().nbytes():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def parts(engine: Engine) -> dict[str, list[Tensor]]:
    """The tensors of the state by what they are for, as DeepSpeed keeps them."""
    deepspeed, parameters = engine._engine, list(engine.model.parameters())
    wrapper = deepspeed.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    pieces = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    masters = [*getattr(wrapper, "fp32_partitioned_groups_flat", [])]
    masters += getattr(wrapper, "single_partition_of_fp32_groups", [])
    gradients = [one.grad for one in (*parameters, *masters) if one.grad is not None]
    gradients += [kept for one in parameters if (kept := getattr(one, "grad_accum", None)) is not None]
    for name in ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer"):
        gradients += tensors_in(getattr(wrapper, name, None))
    buckets = [tensor for bucket in getattr(wrapper, "ipg_buckets", {}).values() for tensor in tensors_in(vars(bucket))]
    return {
        "weights": pieces or [parameter.data for parameter in parameters],
        "whole": [parameter.data for parameter in parameters],
        "master": masters,
        "moments": [*tensors_in([list(state.values()) for state in inner.state.values()])],
        "average": engine.average._means if engine.average is not None else [],
        "gradients": gradients,
        "buckets": buckets,
        "buffers": [*engine.model.buffers(), *(engine.average.buffers.values() if engine.average is not None else ())],
    }


def weighed(engine: Engine) -> dict[str, int]:
    """Bytes of each part; "rest": all that Python reaches beside them and what was there before `gc.freeze`."""
    seen: set[int] = set()
    found, kind = {}, engine.member.device.type
    for name, tensors in parts(engine).items():
        own = {address: size for address, size in storages(tensors, kind).items() if address not in seen}
        found[name] = sum(own.values())
        seen |= own.keys()
    gc.collect()
    left = storages((thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)), kind)
    found["rest"] = sum(size for address, size in left.items() if address not in seen)
    return found


def micros(engine: Engine, step: int) -> Iterator[Micro]:
    """This rank's micro-batches of a step, out of a batch that is there before the first is asked for."""
    draw = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=draw).contiguous(memory_format=torch.channels_last)
    wanted = torch.nn.functional.one_hot(torch.randint(CLASSES, (BATCH,), generator=draw), CLASSES).float()
    member, model = engine.member, engine.model
    assert isinstance(model, CoAtNet)
    cut = [(images[low:high], wanted[low:high], low) for low, high in engine.layout.slices(member.replica)]
    return (
        Micro(
            pictures.clone() if member.begins else None,
            labels if member.ends else None,
            scales(torch.arange(low, low + len(pictures)), model.drop_rates),
        )
        for pictures, labels, low in cut
    )


def held(case: dict[str, Any], base: cluster.Member) -> dict[str, Any]:
    """What this rank holds between two steps, and at the peaks of a step."""
    run = run_of(case)
    member = cluster.in_mesh(base, run.parallel.pipeline, timedelta(seconds=run.cluster.timeout))
    plan = layout(run, member.world)
    gc.collect()
    gc.freeze()  # engines before this one are not given back whole
    making, model = made(run, plan, member)
    engine = Engine(model, run, plan, member)
    for step in range(STEPS):
        engine.forward_backward(micros(engine, step), LOSS)
        engine.update(1e-3)
        norm.commit(engine.model, member.data_group)
    between = weighed(engine)
    peaks = {"whole": 0, "gradients": 0, "activations": 0}
    backward, work = engine._backward, micros(engine, STEPS)
    with Storages() as seen:

        def watched(loss: Tensor) -> None:
            state = parts(engine)
            alive = seen.alive(engine.model, (tensor for own in state.values() for tensor in own))
            now = {name: sum(storages(state[name]).values()) for name in ("whole", "gradients")}
            for name, size in (now | {"activations": sum(alive.values())}).items():
                peaks[name] = max(peaks[name], size)
            backward(loss)

        engine.__dict__["_backward"] = watched
        engine.forward_backward(work, LOSS)
    engine.update(1e-3)
    sizes = [int(getattr(one, "ds_numel", one.numel())) for one in engine.model.parameters()]
    estimate = fit.estimate(run, plan, CLASSES, member.stage)
    return {
        "parameters": sum(sizes),
        "largest": max(sizes),
        "small": {
            name: int(getattr(one, "ds_numel", 0))
            for name, one in engine.model.named_parameters()
            if getattr(one, "ds_persist", False)
        },
        "making": making,
        "between": between,
        "peaks": peaks,
        "estimate": vars(estimate),
        "inside": inside(run, member.stage),
        "loaded": plan.accumulation * plan.micro_batch * 3 * run.model.resolution**2,  # here no loader holds pictures
    }


def made(run: Run, plan: Layout, member: cluster.Member) -> tuple[dict[str, int], CoAtNet]:
    """The network, and bytes of weights and of whatever else there is while it is made: at most, and of a block.

    Looked at whenever a block has its weights and is about to be cut.
    """
    peaks = {"most": 0, "block": 0}
    cut = Cutter.__call__
    with Storages() as seen:

        def looked(self: Cutter, block: torch.nn.Module) -> None:
            gc.collect()  # what nobody holds any more but a circle of references is not needed
            peaks["most"] = max(peaks["most"], settled(seen))
            peaks["block"] = max(
                peaks["block"], sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
            )
            cut(self, block)

        with patch.object(Cutter, "__call__", looked):
            model = network.in_layout(run, CLASSES, plan, member)
    return peaks, model


def settled(seen: Storages) -> int:
    """Bytes that are alive, the least of a few looks: gloo's threads hold what they have sent a moment longer."""
    sizes = []
    for _ in range(5):
        sizes.append(sum(seen.alive(torch.nn.Module()).values()))
        time.sleep(0.01)
    return min(sizes)


def inside(run: Run, stage: int) -> int:
    """Bytes of the block that takes most while it is made again in the backward pass of `stage`."""
    cut = partition.stages(run, CLASSES, run.parallel.micro_batch)[stage]
    blocks = partition.block_bytes(run, CLASSES, run.parallel.micro_batch, partition.inside(run))
    return max(block.inside for block in blocks[cut.first : cut.last])


def main(cases_file: str, out_file: str) -> None:
    """Run every case and let each rank write what it saw."""
    member = cluster.join(run_of({}))
    torch.set_num_threads(1)
    answers = {name: held(case, member) for name, case in json.loads(Path(cases_file).read_text()).items()}
    Path(f"{out_file}.{member.rank}").write_text(json.dumps(answers))
    cluster.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
