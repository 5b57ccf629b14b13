"""Step times and rates between two log lines."""

import resource
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from trainer.cluster import Member


@dataclass
class Meter:
    """Counts what happens between two log lines.

    Attributes:
        multiply_adds: of one image's forward pass.
        global_batch: images per step.
    """

    member: Member
    multiply_adds: int
    global_batch: int
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0  # seconds this rank stood waiting for data
    loss: torch.Tensor | None = None  # sum of the steps' losses, on the device

    def step(self, loss: torch.Tensor, waited: float) -> None:
        """Count one step; never waits for the device."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.steps += 1
        self.waited += waited

    def restart(self) -> None:
        """Begin a new interval, after a log line or after time that was not training (evaluation, save)."""
        self.started, self.steps, self.waited, self.loss = time.perf_counter(), 0, 0.0, None

    def metrics(self) -> dict[str, float]:
        """Mean rates of the interval under the names of DESIGN.md.

        A collective call that waits for the device: the loss is the mean over all ranks, the same on each.
        """
        assert self.loss is not None, "metrics of an interval without steps"
        total = self.loss.double().cpu()
        dist.all_reduce(total, group=self.member.control)
        loss = float(total) / (self.steps * self.member.world)
        seconds = time.perf_counter() - self.started
        rate = self.steps * self.global_batch / seconds
        values = {
            "train/loss": loss,
            "data/wait_fraction": self.waited / seconds,
            "perf/images_per_second": rate,
            "perf/images_per_second_per_device": rate / self.member.world,
            "memory/peak_bytes": float(peak_bytes(self.member.device)),
        }
        if self.member.peak is not None:
            values["perf/mfu"] = 6.0 * self.multiply_adds * rate / (self.member.world * self.member.peak)
        return values


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU by torch's allocator, on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
