"""The process group of a run, the device of this rank, and what the device can do at best."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import InputError
from configs.schema import Run
from trainer.machine.devices import peak_of
from trainer.plan import layout, refuse_mesh


@dataclass(frozen=True)
class Member:
    """This process among those of the run, which form a mesh: rank = stage * replicas + replica.

    The replicas of a stage have neighbouring ranks, since ZeRO's traffic between them is the heavier one: they share
    a machine where they can.
    """

    rank: int
    world: int
    local_rank: int  # number of its device on this machine
    device: torch.device
    control: dist.ProcessGroup  # gloo, for flags and reports: never queued behind the device's work
    stages: int = 1  # of the pipeline
    data_group: dist.ProcessGroup | None = None  # the replicas of this stage; None: all ranks
    pipe_group: dist.ProcessGroup | None = None  # the stages of this replica, in order; None: there is one stage
    speaks: bool = True  # for its machine: the one rank there that watches processors, memory and network

    @property
    def first(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Ranks that hold the same stage."""
        return self.world // self.stages

    @property
    def replica(self) -> int:
        """Number of this rank among those of its stage."""
        return self.rank % self.replicas

    @property
    def stage(self) -> int:
        """Number of the part of the network that this rank computes."""
        return self.rank // self.replicas

    @property
    def begins(self) -> bool:
        """Whether this stage takes the pictures."""
        return self.stage == 0

    @property
    def ends(self) -> bool:
        """Whether this stage gives the logits."""
        return self.stage == self.stages - 1

    @property
    def device_name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s of the device, None where unknown (MFU is then not reported)."""
        return peak_of(self.device_name)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def device_kind(run: Run) -> str:
    """`cpu` or `cuda`: the run's wish, or what this machine has."""
    if run.cluster.device != "auto":
        return run.cluster.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def local_ranks(run: Run) -> int:
    """Processes to start on this machine: the run's wish, else as many as fit its batch, at most one per GPU or two."""
    if run.cluster.ranks:
        return run.cluster.ranks
    most = torch.cuda.device_count() if device_kind(run) == "cuda" else max(2, run.parallel.pipeline)
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
    return host_bytes() // ranks


def host_bytes() -> int:
    """Memory of this machine, without that of its GPUs."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def join(run: Run) -> Member:
    """Enter the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe."""
    kind = device_kind(run)
    os.environ["DS_ACCELERATOR"] = kind  # before DeepSpeed is imported: it would look for GPUs
    # A launcher that binds each process to its own GPU leaves it one device, which is number 0 to the process.
    speaks = local_rank() == 0
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
    patience = timedelta(seconds=max(run.cluster.timeout, run.cluster.start_timeout))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=patience)
    control = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(control, dist.ProcessGroup)
    _require_one_layout(run, control)
    member = Member(dist.get_rank(), dist.get_world_size(), index, device, control, speaks=speaks)
    return in_mesh(member, run.parallel.pipeline, patience)


def shorten(run: Run, kept: Sequence[dist.ProcessGroup]) -> None:
    """From now on a collective waits `cluster.timeout` only: the start, with its compilations and first data, is over.

    Args:
        kept: groups that have a time of their own.
    """
    patience = timedelta(seconds=run.cluster.timeout)
    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # its name before torch 2.14
    for group in dist.distributed_c10d._world.pg_map:
        if isinstance(group, dist.ProcessGroup) and group not in kept:
            set_timeout(patience, group)


def _require_one_layout(run: Run, control: dist.ProcessGroup) -> None:
    """Refuse ranks that would wait for each other for ever. A collective call.

    Raises:
        InputError: their settings of the layout differ: other words at their start, or other rates where the planner
            chose.
    """
    mine = repr(run.parallel)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine, group=control)
    if len(set(every)) > 1:
        raise InputError(
            f"the ranks have different layouts: rank 0 {every[0]}, another "
            f"{next(one for one in every if one != every[0])}; nearest valid: the same command on all of them, with "
            f"parallel.layout pinned"
        )


def in_mesh(member: Member, stages: int, patience: timedelta) -> Member:
    """The same process in a mesh of so many stages. A collective call.

    Raises:
        InputError: the stages do not divide the ranks.
    """
    if stages == 1:
        return replace(member, stages=1, data_group=None, pipe_group=None)
    refuse_mesh(stages, member.world)
    replicas = member.world // stages
    of_stages = [list(range(stage * replicas, (stage + 1) * replicas)) for stage in range(stages)]
    of_replicas = [list(range(replica, member.world, replicas)) for replica in range(replicas)]
    data_group, pipe_group = (_mine(groups, member.rank, patience) for groups in (of_stages, of_replicas))
    # nccl's first operation in a group must be one of all its ranks; the first transfer is between two.
    dist.all_reduce(torch.zeros(1, device=member.device), group=pipe_group)
    return replace(member, stages=stages, data_group=data_group, pipe_group=pipe_group)


def team_group(member: Member, team: int, patience: float = 600.0) -> dist.ProcessGroup | None:
    """The group of `team` consecutive ranks that share BatchNorm statistics; None when a rank is alone.

    Args:
        patience: seconds that a collective of the group may wait.
    """
    if team == 1:
        return None
    teams = [list(range(first, first + team)) for first in range(0, member.world, team)]
    return _mine(teams, member.rank, timedelta(seconds=patience))


def _mine(groups: list[list[int]], rank: int, patience: timedelta) -> dist.ProcessGroup:
    """Make a process group of each list of ranks, on all ranks in the same order; the one with `rank` in it."""
    made = [dist.new_group(ranks, timeout=patience) for ranks in groups]
    mine = made[next(number for number, ranks in enumerate(groups) if rank in ranks)]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
