"""Whose fault it is: the block and the rank a bad gradient comes from, the samples, the tensors that differ.

While all is well only `Probes` cost anything: a few small operations per block and pass, none of which waits for the
device. All other functions are called once something is wrong, by all ranks together, and may take their time.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Run
from data_pipeline import augment
from data_pipeline.batch import Batch
from models.coatnet import CoAtNet
from trainer.cluster import Member
from trainer.engine.engine import Engine

MASK = (1 << 52) - 1  # checksums travel as float64, which holds so many bits exactly
TIMED = 32  # modules, so that marking them costs nothing
SHOWN = 64  # sample keys, and names of tensors, that an event holds at most


class Probes:
    """Remembers, on the device, in which blocks this rank's gradient was not finite, before any rank added its own.

    Of every block the last and the first parameter are looked at: what is wrong behind them in the forward pass comes
    by there. Two, because inside a block BatchNorm may hand it on to ranks that share its statistics.
    """

    def __init__(self, model: CoAtNet, device: torch.device) -> None:
        self.names = [name for name, _ in model.flat]
        self._bad = torch.zeros(2 * len(self.names), dtype=torch.bool, device=device)
        self._numbers = torch.arange(1, len(self._bad) + 1, device=device)
        for number, (_, block) in enumerate(model.flat):
            parameters: list[Any] = list(block.parameters())
            parameters[0].register_hook(partial(self._look, 2 * number))
            parameters[-1].register_hook(partial(self._look, 2 * number + 1))

    def _look(self, number: int, gradient: Tensor) -> None:
        """The gradient of one micro-batch of a parameter."""
        self._bad[number].logical_or_(~torch.isfinite(gradient).all())

    def name(self, place: int) -> str:
        """The block of a place that `take` gave."""
        return self.names[(place - 1) // 2]

    def take(self) -> Tensor:
        """() the place nearest the loss that was bad since the last call, counted from 1; 0: none."""
        worst = (self._bad * self._numbers).max()
        self._bad.zero_()
        return worst


class Culprit(NamedTuple):
    """What a replay found on one rank.

    Attributes:
        stage, place: of the pipeline; number of the block in the stage, -1 for the pictures themselves.
        block: its name, or "images".
        keys: samples that came out not finite.
    """

    stage: int
    place: int
    block: str
    keys: tuple[str, ...]


def replay(engine: Engine, run: Run, batches: list[Batch]) -> Culprit | None:
    """Where a step's samples first give something that is not finite on this rank, one by one; None: nowhere.

    The forward pass is made again, of the weights as they are now, in evaluation mode: there samples do not mix in
    BatchNorm's statistics, so that a bad one shows by itself, and its rank does. A collective call.
    """
    member, model = engine.member, engine.model
    assert isinstance(model, CoAtNet)
    first: list[tuple[int, str]] = []
    keys: list[str] = []

    def look(place: int, name: str, module: Any, inputs: Any, output: Tensor) -> None:
        """Behind a block."""
        if not first and not bool(torch.isfinite(output).all()):
            first.append((place, name))

    hooks = [block.register_forward_hook(partial(look, place, name)) for place, (name, block) in enumerate(model.flat)]
    try:
        with engine.evaluation() as forward:
            for cpu_batch in batches:
                batch = cpu_batch.to(member.device)
                images = batch.images_BCHW
                if member.begins:
                    images = augment.prepare(batch, run.augment, torch.float32, run.precision.channels_last)
                    fine_B = torch.isfinite(images).flatten(1).all(1)
                    keys += _bad_keys(cpu_batch, fine_B)
                    if not fine_B.all():
                        first[:] = [(-1, "images")]
                logits_BK: Tensor | None = forward(images)
                if logits_BK is not None:
                    keys += _bad_keys(cpu_batch, torch.isfinite(logits_BK).all(1))
    finally:
        for hook in hooks:
            hook.remove()
    return Culprit(member.stage, *first[0], tuple(dict.fromkeys(keys))) if first else None


def _bad_keys(batch: Batch, fine_B: Tensor) -> list[str]:
    """Keys of the samples that are not fine; what a stage without keys knows of is their seeds alone."""
    return [key for key, fine in zip(batch.keys, fine_B.tolist(), strict=False) if not fine]


def gathered(value: Any, member: Member) -> list[Any]:
    """A small value of every rank, in their order. A collective call."""
    values: list[Any] = [None] * member.world
    dist.all_gather_object(values, value, group=member.control)
    return values


def replicated(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers, by name, of which every replica of this stage holds the whole.

    Under ZeRO-3 these are the parameters that DeepSpeed keeps whole for being small.
    """
    parameters = {name: parameter.detach() for name, parameter in engine.model.named_parameters() if _whole(parameter)}
    return parameters, engine.buffers()


def _whole(parameter: Any) -> bool:
    """Whether every replica holds all of a parameter."""
    return not hasattr(parameter, "ds_id") or (parameter.ds_persist and parameter.numel() == parameter.ds_numel)


def checksum(tensors: dict[str, Tensor], device: torch.device) -> Tensor:
    """() float64 on the device: equal for equal bits, and another when any one bit differs."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.stack([_bits(value) for value in tensors.values()])
    odd = 2 * torch.arange(len(sums), device=sums.device) + 1
    return ((sums * odd).sum() & MASK).double()


def _bits(value: Tensor) -> Tensor:
    """() the sum of a tensor's elements read as whole numbers."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.view(kinds[value.element_size()]).sum(dtype=torch.int64)


def differing(engine: Engine) -> list[str]:
    """Names of the tensors that replicas of some stage hold differently. A collective call."""
    parameters, buffers = replicated(engine)
    mine = {name: int(_bits(value)) for name, value in (parameters | buffers).items()}
    every: list[dict[str, int]] = gathered(mine, engine.member)
    names: Counter[str] = Counter()
    for first in range(0, len(every), engine.member.replicas):
        replicas = every[first : first + engine.member.replicas]
        names.update(name for name in replicas[0] if len({sums[name] for sums in replicas}) > 1)
    return list(names)[:SHOWN]


def timed(model: CoAtNet, compiled: bool) -> Sequence[nn.Module]:
    """What is timed on a GPU: the largest convolutions and linear maps, which wait for no other rank.

    ZeRO-3's weights are there before they begin: DeepSpeed's hooks are older than those of `Stopwatch`. The parts of
    compiled blocks have no hooks: there it is the whole network, which waits where BatchNorm's groups span ranks.
    """
    if compiled:
        return [model]
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return sorted(found, key=lambda module: -int(getattr(module.weight, "ds_numel", module.weight.numel())))[:TIMED]


class Stopwatch:
    """How long this rank computes in a step, without what it waits for others.

    On a CPU the time that this thread has a core, which it gives back while it waits. On a GPU the device's time in the
    forward passes of what is `timed`, also where recomputation makes them again.

    Attributes:
        noise: seconds of a step that are no difference.
    """

    def __init__(self, model: CoAtNet, device: torch.device, compiled: bool) -> None:
        self._passes: list[tuple[Any, Any]] = []
        self._began: Any = None
        self._cuda = device.type == "cuda"
        self.noise = 0.0005 if self._cuda else 0.005
        for module in timed(model, compiled) if self._cuda else ():
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        """A forward pass begins; recomputation may break it off when it has what it came for."""
        event: Any = torch.cuda.Event
        self._began = event(enable_timing=True)
        self._began.record()

    def _end(self, *_: Any) -> None:
        """It ends."""
        event: Any = torch.cuda.Event
        ended = event(enable_timing=True)
        ended.record()
        self._passes.append((self._began, ended))

    def restart(self) -> None:
        """Forget passes that belong to no step."""
        self._passes = []

    def take(self, seconds: float) -> "Measured":
        """What was measured in a step, for `read`; on a CPU its thread's `seconds`."""
        passes, self._passes = self._passes, []
        return passes if self._cuda else seconds


Measured = list[tuple[Any, Any]] | float


def read(measured: Measured) -> float:
    """The seconds of a measurement, once the device has done with it."""
    if isinstance(measured, float):
        return measured
    return sum(float(begun.elapsed_time(ended)) for begun, ended in measured) / 1000
