"""Writes down what this rank does with every process group during its first steps, for `trainer/stages/trace.py`.

Every function of torch.distributed, whoever calls it and under whichever name it was imported, ends in a method of the
one class ProcessGroup, and every wait in Work.wait: these are wrapped while a recording goes on, and put back after
it. A line is written before its operation begins, so that the last lines of a run that hangs say where.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from configs.schema import Run
from models import norm
from trainer.engine.deepspeed_shims import elements
from trainer.engine.engine import Engine
from trainer.stages import partition
from trainer.stages.wire import Share

STEPS = 3  # steps of a run that are recorded, with the evaluations and saves between them

# Methods of ProcessGroup in torch 2.11 to 2.15: what they do, and which argument is the whole tensor. The operation
# of a gather or scatter of which only one rank has the whole is known by the part.
METHODS: dict[str, tuple[str, int | None]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "gather": ("gather", 1),
    "gather_into_tensor": ("gather", 1),
    "gather_single": ("gather", 1),
    "scatter": ("scatter", 0),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
    "send": ("send", 0),
    "recv": ("receive", 0),
    "recv_anysource": ("receive", 0),
}

# The last but one wraps what torch calls deprecated.
_PASSED_BY = (
    str(Path(torch.__file__).parent), "/deepspeed/comm/", "/deepspeed/utils/", "/contextlib.py",
    "/typing_extensions.py", __file__,
)  # fmt: skip


class Recorder:
    """One rank's recording.

    Attributes:
        count: operations written.
    """

    def __init__(self, path: Path, facts: dict[str, Any], model: nn.Module | None = None) -> None:
        """Begin.

        Args:
            path: the file to write, `runs/NAME/trace/rank-00000.jsonl`.
            facts: of the run, for the first line: rank and world at least.
            model: whose forward passes are marked.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="ascii", buffering=1)
        self.count, self._left = 0, STEPS
        self._waits: dict[int, tuple[Any, list[int]]] = {}  # by a handle's id; the handle, what it waits for
        self._batch: list[int] | None = None  # operations of the batch under way
        self._depth = 0  # of backward passes, which fairscale's recomputation nests
        self._marks: dict[str, int] = {}  # passes so far in this part of the run, by kind
        self._inputs_only = False  # whether the stage makes its forward passes twice
        self._write(**facts)
        self._restore = [_patch(dist.ProcessGroup, name, self._operation) for name in METHODS]
        self._restore += [
            _patch(dist.ProcessGroup, "_start_coalescing", self._start),
            _patch(dist.ProcessGroup, "_end_coalescing", self._end),
            _patch(dist.Work, "wait", self._wait),
            _patch(dist, "batch_isend_irecv", self._transfers),
            _patch(c10d, "batch_isend_irecv", self._transfers),
            _patch(torch.autograd, "backward", self._backward),
        ]
        if model is not None:
            hooks = [model.register_forward_pre_hook(self._forward)]
            hooks.append(model.register_forward_hook(lambda *_: self._write(mark="end")))
            self._restore += [hook.remove for hook in hooks]

    def part(self, name: str) -> None:
        """What follows belongs to this part of the run: "step 1", "after step 1"."""
        self._marks.clear()
        self._write(part=name)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the optimizer step of this number: records it while there are few, and ends the recording after."""
        if self._left == 0:
            self.close()
        else:
            self._left -= 1
        self.part(f"step {number}")
        yield
        self.part(f"after step {number}")

    def close(self) -> None:
        """End. Whatever was wrapped is as it was."""
        while self._restore:
            self._restore.pop()()
        self._waits.clear()
        self._file.close()

    def _operation(self, name: str, call: Callable[..., Any], group: dist.ProcessGroup, *args: Any, **more: Any) -> Any:
        """A method of ProcessGroup that communicates."""
        kind, where = METHODS[name]
        values = [*args, *more.values()]
        tensors = [] if where is None else list(_tensors(values[where]))
        ranks = dist.get_process_group_ranks(group)
        number, self.count = self.count, self.count + 1
        line: dict[str, Any] = {"n": number, "op": kind, "group": group.group_name, "ranks": ranks}
        if kind in ("send", "receive"):
            line["peer"] = None if name == "recv_anysource" else ranks[int(values[1])]
        line["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        line["dtype"] = "+".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
        line |= _options(values, ranks)
        if self._batch is not None:
            self._batch.append(number)
            line["batch"] = self._batch[0]
        self._write(**line, place=_place())
        work = call(group, *args, **more)
        if work is not None:
            self._waits[id(work)] = (work, [number])
        return work

    def _start(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """The beginning of what nccl does as one operation."""
        if self._batch is None:
            self._batch = []
        return call(*args)

    def _end(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """The end of it."""
        numbers, self._batch = self._batch or [], None
        work = call(*args)
        if work is not None:
            self._waits[id(work)] = (work, numbers)
        return work

    def _transfers(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """A batch of transfers, which gloo does one by one."""
        self._batch = []
        works = call(*args)
        self._batch = None
        return works

    def _wait(self, name: str, call: Callable[..., Any], work: Any, *args: Any, **more: Any) -> Any:
        """A wait for the end of an operation."""
        _, numbers = self._waits.pop(id(work), (None, None))
        if numbers:
            self._write(wait=numbers)
        return call(work, *args, **more)

    def _forward(self, module: nn.Module, _: Any) -> None:
        """A forward pass begins. A stage that keeps its inputs only makes its first one without gradients."""
        self._inputs_only |= module.training and not torch.is_grad_enabled()
        again = self._inputs_only and torch.is_grad_enabled()
        self._mark("evaluate" if not module.training else "recompute" if again else "forward")

    def _backward(self, name: str, call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """A backward pass."""
        self._depth += 1
        if self._depth == 1:
            self._mark("backward")
        try:
            return call(*args, **more)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._write(mark="end")

    def _mark(self, kind: str) -> None:
        """The next pass of a kind; passes of one kind follow each other in the order of micro-batches."""
        number = self._marks.get(kind, 0)
        self._marks[kind] = number + 1
        self._write(mark=kind, micro=number)

    def _write(self, **line: Any) -> None:
        """One line."""
        if not self._file.closed:
            self._file.write(json.dumps(line) + "\n")


def begin(run: Run, classes: int, folder: Path, engine: Engine) -> Recorder:
    """Begin to record this rank in the run's folder.

    Args:
        classes: outputs of the classifier.
        folder: the run's.
    """
    member = engine.member
    facts = {
        "rank": member.rank,
        "world": member.world,
        "backend": dist.get_backend(),
        "torch": torch.__version__,
        "control": member.control.group_name,
        "share": asdict(share_of(run, classes, engine)),
    }
    return Recorder(folder / "trace" / f"rank-{member.rank:05d}.jsonl", facts, engine.model)


def share_of(run: Run, classes: int, engine: Engine) -> Share:
    """This rank's part in the run, for the formulas of `trainer/stages/wire.py`."""
    member, plan, zero = engine.member, engine.layout, engine.config["zero_optimization"]
    layers = list(engine.model.modules())
    mapped = {
        id(parameter)
        for layer in layers
        if type(layer) in (nn.Conv2d, nn.Linear)
        for parameter in layer.parameters(recurse=False)
    }
    cuts = partition.stages(run, classes, plan.micro_batch) if plan.stages > 1 else ()
    return Share(
        zero=run.parallel.zero,
        dtype=run.precision.dtype,
        recompute=run.parallel.recompute,
        accumulation=plan.accumulation,
        replicas=plan.replicas,
        stages=plan.stages,
        stage=member.stage,
        groups=[[(elements(one), int(id(one) in mapped)) for one in group["params"]] for group in engine.groups],
        channels=sum(layer.running_mean.numel() for layer in layers if isinstance(layer, norm.BatchNorm)),
        team=plan.team,
        to_next=0 if member.ends else cuts[member.stage].boundary_bytes,
        to_previous=0 if member.begins else cuts[member.stage - 1].boundary_bytes,
        threshold=zero["stage3_param_persistence_threshold"],
        reuse=zero["stage3_max_reuse_distance"],
        shard=run.parallel.shard_group,
    )


def _patch(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Let `around` (name, the function itself, its arguments) take the calls of a function; returns what undoes it."""
    original = getattr(owner, name, None)
    if original is None:  # another version of torch has it
        return lambda: None

    @functools.wraps(original)
    def wrapped(*args: Any, **more: Any) -> Any:
        """Call `around`."""
        return around(name, original, *args, **more)

    kept = vars(owner)[name]  # not what getattr gives, which has lost the binding to an instance
    setattr(owner, name, wrapped)
    return functools.partial(setattr, owner, name, kept)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in lists of lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _options(values: list[Any], ranks: list[int]) -> dict[str, Any]:
    """What else the ranks of a collective must agree on."""
    found: dict[str, Any] = {}
    for value in values:
        if hasattr(value, "reduceOp"):
            found["reduce"] = getattr(value.reduceOp, "op", value.reduceOp).name
        if hasattr(value, "rootRank"):
            found["root"] = ranks[value.rootRank]
    return found


def _place() -> str:
    """The line of the program that wants the operation."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in _PASSED_BY):
        frame = frame.f_back
    if frame is None:
        return "unknown"
    file = Path(frame.f_code.co_filename)
    return f"{'/'.join(file.parts[-2:])}:{frame.f_lineno}"
