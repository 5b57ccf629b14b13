"""What tests on a GPU share."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from trainer.cluster import Member
from trainer.launch import free_port


@pytest.fixture(scope="module")
def member() -> Iterator[Member]:
    """A run of one rank on the first GPU."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    yield Member(0, 1, 0, torch.device("cuda", 0), group)
    dist.destroy_process_group()
