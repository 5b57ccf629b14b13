"""Drives the stages of a pipeline: computes and exchanges micro-batches in the order of `trainer.stages.schedule`.

Under ZeRO-0/1 a stage keeps the activations of every micro-batch in flight. Under ZeRO-2/3 DeepSpeed can follow one
graph at a time, so a stage keeps its inputs only: the first forward pass is without gradients, and the backward pass
makes the forward pass again. That is the activation checkpointing of such a run. The last stage, whose backward pass
follows its forward pass at once, makes nothing again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models import norm
from trainer.cluster import Member
from trainer.stages.schedule import Compute, Exchange, Transfer, one_forward_one_backward

Forward = Callable[[Tensor, Tensor | None], Tensor]  # (input, factors of stochastic depth) to output
Backward = Callable[[Tensor], None]  # of a scalar; also counts the micro-batch


class Micro(NamedTuple):
    """What one stage needs of one micro-batch of B samples."""

    images: Tensor | None  # (B, 3, H, W) float; the first stage
    targets: Tensor | None  # (B, classes) float32; the last stage
    drop_SB: Tensor | None  # `models.drop_path.scales`, of the whole network


class Form(NamedTuple):
    """How a tensor between two stages looks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """The form in which `tensor` travels: in its own memory format, so that no layout is changed on the way."""
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(tensor.shape), tensor.dtype, last)

    def empty(self, device: torch.device) -> Tensor:
        """Room for such a tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.layout)

    @property
    def layout(self) -> torch.memory_format:
        """The memory format."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(eq=False)
class Pipeline:
    """One stage among its neighbours.

    Attributes:
        remakes: keep a stage's input only and make its forward pass again, instead of keeping all activations.
    """

    member: Member
    remakes: bool
    _forms: dict[tuple[int, int, bool], Form] = field(default_factory=dict)  # by peer, samples, training or not
    _sent: list[Any] = field(default_factory=list)  # transfers under way, and what they read from

    def train(
        self, forward: Forward, backward: Backward, micros: Iterator[Micro], count: int, samples: int, loss_of: Any
    ) -> Tensor:
        """All micro-batches of one optimizer step, forward and backward.

        Args:
            forward: of this stage in training mode.
            backward: accumulates the gradients behind a scalar.
            micros: at least `count` micro-batches.
            count: micro-batches of the step.
            samples: of a micro-batch.
            loss_of: loss of (logits, targets), a mean over the micro-batch.

        Returns:
            () the sum of the losses, the same on every stage of the replica.
        """
        work = _Work(self, forward, backward, micros, samples, loss_of)
        for step in one_forward_one_backward(self.member.stages, self.member.stage, count):
            if not isinstance(step, Compute):
                work.exchange(step)
            elif step.kind == "forward":
                work.forward_of(step.micro)
            else:
                work.backward_of(step.micro)
        self.finish(0)
        dist.all_reduce(work.loss, group=self.member.pipe_group)
        return work.loss

    def relay(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor | None:
        """One batch through all stages, in evaluation.

        Args:
            forward: of this stage.
            images: (B, 3, H, W); the first stage reads it, the others take B from it.

        Returns:
            The logits on the last stage, None on the others.
        """
        member, x = self.member, images
        if not member.begins:
            (x,) = self.swap([], [(member.stage - 1, len(images))], training=False)
        y = forward(x)
        if member.ends:
            return y
        self.swap([(member.stage + 1, y)], [], training=False)
        self.finish(1)
        return None

    def swap(
        self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, int]], training: bool = True
    ) -> list[Tensor]:
        """Start transfers together, wait for what is received.

        Args:
            sends: (stage, tensor). The first of its size to a stage is announced, so that it can make room.
            receives: (stage, samples).
            training: in evaluation the same number of samples may look different.

        Returns:
            What was received, in order.

        Raises:
            RuntimeError: a tensor is not as announced, or has other samples than this stage expects.
        """
        member, operations, kept = self.member, [], []
        for stage, tensor in sends:
            key = (stage, len(tensor), training)
            if key not in self._forms:
                self._forms[key] = Form.of(tensor)
                self._announce(stage, self._forms[key])
            self._check(stage, self._forms[key], tuple(tensor.shape), tensor.dtype)
            kept.append(_dense(tensor.contiguous(memory_format=self._forms[key].layout)))
            operations.append(dist.P2POp(dist.isend, kept[-1], self._rank(stage), member.pipe_group))
        received = []
        for stage, samples in receives:
            key = (stage, samples, training)
            if key not in self._forms:
                form = self._forms[key] = self._announced(stage)
                self._check(stage, form, (samples, *form.shape[1:]), form.dtype)
            received.append(self._forms[key].empty(member.device))
            operations.append(dist.P2POp(dist.irecv, _dense(received[-1]), self._rank(stage), member.pipe_group))
        works = dist.batch_isend_irecv(operations)  # one for all of them with nccl, one for each with gloo
        if receives:
            for work in works[-len(receives) :]:
                work.wait()  # with nccl the device's queue waits, not this process
        self._sent += [(work, kept) for work in works[: len(sends)]]
        # What was sent so long ago has been received: the gradient that answers it is here.
        self.finish(2 * member.stages)
        return received

    def finish(self, left: int = 0) -> None:
        """Wait until all but the newest `left` of the transfers sent have arrived."""
        while len(self._sent) > left:
            self._sent.pop(0)[0].wait()

    def _rank(self, stage: int) -> int:
        """The rank of this replica's part in `stage`."""
        return stage * self.member.replicas + self.member.replica

    def _check(self, peer: int, form: Form, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Refuse what does not fit the room that was made for it: nccl would wait, or read past its end."""
        if (form.shape, form.dtype) != (shape, dtype):
            raise RuntimeError(
                f"between stages {self.member.stage} and {peer}: {form.shape} in {form.dtype} was announced, stage "
                f"{self.member.stage} has {shape} in {dtype}; do all ranks run the same configuration?"
            )

    def _announce(self, stage: int, form: Form) -> None:
        """Tell a stage how what it will receive looks: dtype, memory format, dimensions, sizes."""
        facts = [_DTYPES.index(form.dtype), int(form.channels_last), len(form.shape), *form.shape, 0, 0, 0, 0]
        dist.send(torch.tensor(facts[:8]), self._rank(stage), group=self.member.control)

    def _announced(self, stage: int) -> Form:
        """What `_announce` of the stage before says."""
        facts = torch.empty(8, dtype=torch.int64)
        dist.recv(facts, self._rank(stage), group=self.member.control)
        dtype, channels_last, dimensions, *sizes = facts.tolist()
        return Form(tuple(sizes[:dimensions]), _DTYPES[dtype], bool(channels_last))


class _Work:
    """The micro-batches of one optimizer step on one stage."""

    def __init__(
        self,
        pipeline: Pipeline,
        forward: Forward,
        backward: Backward,
        micros: Iterator[Micro],
        samples: int,
        loss_of: Any,
    ) -> None:
        self.pipeline, self.member = pipeline, pipeline.member
        self.forward, self.backward = forward, backward
        self.micros, self.samples, self.loss_of = micros, samples, loss_of
        self.loss = torch.zeros((), device=pipeline.member.device)
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}  # with their graphs, or to be sent
        self._drops: dict[int, Tensor | None] = {}
        self._gradients: dict[int, Tensor] = {}  # received, or to be sent

    def exchange(self, step: Exchange) -> None:
        """Send what is ready and receive what is needed next."""
        sends = [(transfer.peer, self._outgoing(transfer)) for transfer in step if transfer.kind == "send"]
        wanted = [transfer for transfer in step if transfer.kind == "receive"]
        found = self.pipeline.swap(sends, [(transfer.peer, self.samples) for transfer in wanted])
        for transfer, tensor in zip(wanted, found, strict=True):
            place = self._inputs if transfer.what == "activation" else self._gradients
            place[transfer.micro] = tensor

    def _outgoing(self, transfer: Transfer) -> Tensor:
        """The tensor of a transfer that sends; a gradient is forgotten here."""
        if transfer.what == "gradient":
            return self._gradients.pop(transfer.micro)
        output = self._outputs[transfer.micro].detach()
        if self.pipeline.remakes:
            del self._outputs[transfer.micro]
        return output

    def forward_of(self, number: int) -> None:
        """The forward pass of a micro-batch; the last stage goes on to its loss."""
        micro = next(self.micros)
        if micro.images is not None:
            self._inputs[number] = micro.images
        x = self._inputs[number]
        self._drops[number] = micro.drop_SB
        if self.member.ends:
            assert micro.targets is not None, "the last stage needs targets"
            logits = self.forward(x.requires_grad_(not self.member.begins), micro.drop_SB)
            self._outputs[number] = self.loss_of(logits.float(), micro.targets)
            self.loss += self._outputs[number].detach()
        elif self.pipeline.remakes:
            with torch.no_grad():
                self._outputs[number] = self.forward(x, micro.drop_SB)
        else:
            self._outputs[number] = self.forward(x.requires_grad_(not self.member.begins), micro.drop_SB)

    def backward_of(self, number: int) -> None:
        """The backward pass of a micro-batch from its loss, or from the gradient of its output."""
        x, drop = self._inputs.pop(number), self._drops.pop(number)
        if self.member.ends:
            self.backward(self._outputs.pop(number))
        elif self.pipeline.remakes:
            with norm.recomputing():
                again = self.forward(x.requires_grad_(not self.member.begins), drop)
            self.backward(_pulled(again, self._gradients.pop(number)))
        else:
            self.backward(_pulled(self._outputs.pop(number), self._gradients.pop(number)))
        if not self.member.begins:
            assert x.grad is not None
            self._gradients[number] = x.grad


class _Pull(torch.autograd.Function):
    """A scalar whose backward pass gives the tensor it came from a gradient that was received.

    DeepSpeed begins every backward pass at a loss and scales that; the received gradient was scaled where it began.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        """Zero, in the output's dtype."""
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        """The gradient as it was received."""
        (gradient,) = ctx.saved_tensors
        return gradient, None


def _pulled(output: Tensor, gradient: Tensor) -> Tensor:
    """The scalar to begin the backward pass of `output` at."""
    scalar: Tensor = _Pull.apply(output, gradient)
    return scalar


def _dense(tensor: Tensor) -> Tensor:
    """A dense tensor as a view in the order of its memory, which is what can be sent."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor
