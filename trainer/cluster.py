"""The process group of a run, the device of this rank, and what the device can do at best."""

import contextlib
import os
import re
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.errors import InputError
from configs.schema import Run
from trainer.plan import layout

# Dense bf16 peak in FLOP/s by whole words of the device's name, longest match first; vendors' data sheets.
PEAKS: dict[str, float] = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Member:
    """This process among those of the run."""

    rank: int
    world: int
    local_rank: int  # number of its device on this machine
    device: torch.device
    control: dist.ProcessGroup  # gloo, for flags and reports: never queued behind the device's work

    @property
    def first(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s of the device, None where unknown (MFU is then not reported)."""
        return peak_of(self.device_name)


def peak_of(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device name, None if it is not in the table."""
    matches = [key for key in PEAKS if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", name)]  # an A1000 is no A100
    return PEAKS[max(matches, key=len)] if matches else None


def device_kind(run: Run) -> str:
    """`cpu` or `cuda`: the run's wish, or what this machine has."""
    if run.cluster.device != "auto":
        return run.cluster.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def local_ranks(run: Run) -> int:
    """Processes to start on this machine: the run's wish, else as many as fit its batch, at most one per GPU or two."""
    if run.cluster.ranks:
        return run.cluster.ranks
    most = torch.cuda.device_count() if device_kind(run) == "cuda" else 2
    for ranks in range(most, 1, -1):
        with contextlib.suppress(InputError):  # this many do not divide the batch or its BatchNorm groups
            return layout(run, ranks).world
    return most


def local_rank() -> int:
    """This process's number on its machine, as torchrun or else srun gives it; 0 where nobody does."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def local_world() -> int:
    """Ranks that an outside launcher started on this machine: torchrun's word, else srun's; 1 where neither says.

    SLURM counts the step's tasks per node as `4(x2),3`: the first number is this machine's or a larger one.
    """
    names = ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    said = next((os.environ[name] for name in names if os.environ.get(name)), "1")
    return int(said.partition(",")[0].partition("(")[0])


def available_bytes(run: Run, ranks: int) -> int:
    """Memory that one of `ranks` processes of this machine may take: its GPU's, or its share of the host's."""
    if device_kind(run) == "cuda":
        return min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks


def join(run: Run) -> Member:
    """Enter the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe."""
    kind = device_kind(run)
    os.environ["DS_ACCELERATOR"] = kind  # before DeepSpeed is imported: it would look for GPUs
    # A launcher that binds each process to its own GPU leaves it one device, which is number 0 to the process.
    index = 0 if kind == "cuda" and torch.cuda.device_count() == 1 else local_rank()
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes its device from here
    device = torch.device(kind, index) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not run.precision.deterministic
        torch.backends.cudnn.benchmark = not run.precision.deterministic
    if run.precision.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    patience = timedelta(seconds=run.cluster.timeout)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=patience)
    control = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(control, dist.ProcessGroup)
    return Member(dist.get_rank(), dist.get_world_size(), index, device, control)


def team_group(member: Member, team: int) -> dist.ProcessGroup | None:
    """The group of `team` consecutive ranks that share BatchNorm statistics; None when a rank is alone."""
    if team == 1:
        return None
    mine: dist.ProcessGroup | None = None
    for first in range(0, member.world, team):
        group = dist.new_group(list(range(first, first + team)))
        if first <= member.rank < first + team:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    return mine


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
