"""Step times and rates between two log lines."""

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.cluster import Member
from trainer.cost.energy import EnergyMeter


@dataclass
class Meter:
    """Counts what happens between two log lines.

    Attributes:
        multiply_adds: of one image's forward pass.
        global_batch: images per step.
        energy: of this rank's device.
        base: bytes of this rank before it built anything (`resident_bytes`).
        used: joules, and the device-seconds that they are of, over all ranks; as of the last `metrics` or `settle`.
    """

    member: Member
    multiply_adds: int
    global_batch: int
    energy: EnergyMeter
    base: int = 0
    used: tuple[float, float] = (0.0, 0.0)
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0  # seconds this rank stood waiting for data
    sums: torch.Tensor | None = None  # on the device: losses of the healthy steps, their number
    skipped: torch.Tensor | None = None  # on the device: steps in a row, up to now, that were left out

    def step(self, loss: torch.Tensor, healthy: torch.Tensor, waited: float) -> None:
        """Count one step; never waits for the device."""
        part = torch.stack([torch.where(healthy, loss, 0.0), healthy.float()])
        self.sums = part if self.sums is None else self.sums + part
        before = torch.zeros_like(loss) if self.skipped is None else self.skipped
        self.skipped = torch.where(healthy, 0.0, before + 1)
        self.steps += 1
        self.waited += waited

    def restart(self) -> None:
        """Begin a new interval, after a log line or after time that was not training (evaluation, save)."""
        self.started, self.steps, self.waited, self.sums = time.perf_counter(), 0, 0.0, None

    def metrics(self) -> dict[str, float]:
        """Mean rates of the interval under the names of DESIGN.md.

        A collective call that waits for the device: the loss is the mean over all ranks, the same on each; it is
        left out when no step of the interval was healthy.
        """
        assert self.sums is not None, "metrics of an interval without steps"
        total = torch.cat([self.sums.double().cpu(), torch.tensor(self.energy.read(), dtype=torch.float64)])
        dist.all_reduce(total, group=self.member.control)
        loss, healthy, *used = total.tolist()
        self.used = used[0], used[1]
        seconds = time.perf_counter() - self.started
        rate = self.steps * self.global_batch / seconds
        values = {
            "train/skipped_steps": self.steps - healthy / self.member.world,
            "data/wait_fraction": self.waited / seconds,
            "perf/images_per_second": rate,
            "perf/images_per_second_per_device": rate / self.member.world,
            "memory/peak_bytes": float(peak_bytes(self.member.device)),
        }
        if healthy:
            values["train/loss"] = loss / healthy
        if self.member.peak is not None:
            values["perf/mfu"] = 6.0 * self.multiply_adds * rate / (self.member.world * self.member.peak)
        return values

    def settle(self) -> None:
        """Bring `used` up to date when no more steps follow. A collective call."""
        total = torch.tensor(self.energy.read(), dtype=torch.float64)
        dist.all_reduce(total, group=self.member.control)
        self.used = float(total[0]), float(total[1])

    @property
    def skipped_in_a_row(self) -> int:
        """Steps up to now whose update was left out. Waits for the device."""
        return 0 if self.skipped is None else int(self.skipped)


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU by torch's allocator, on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(device: torch.device) -> int:
    """Memory held now: on the GPU by torch's allocator, on the CPU by the process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
