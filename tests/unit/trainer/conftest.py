"""What tests of the trainer share."""

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from trainer.cluster import Member
from trainer.launch import free_port


@pytest.fixture(scope="module")
def member() -> Iterator[Member]:
    """A run of one rank, with a process group that goes away again."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LOCAL_RANK", "0")  # as `cluster.join` does, for DeepSpeed
    patch.setenv("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    yield Member(0, 1, 0, torch.device("cpu"), group)
    dist.destroy_process_group()
    patch.undo()
    if "deepspeed" in sys.modules:
        forget_groups()


def forget_groups() -> None:
    """Let DeepSpeed, which keeps them in globals, forget process groups that are gone."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    for name, value in vars(groups).items():
        if isinstance(value, dist.ProcessGroup):
            vars(groups)[name] = None
