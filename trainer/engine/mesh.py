"""The ranks of a pipeline as DeepSpeed asks for them: its "model parallel unit"."""

import torch.distributed as dist

from trainer.cluster import Member


class Mesh:
    """What DeepSpeed asks a "model parallel unit": which ranks hold the same stage, and which form one replica."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The replicas of this stage, over which ZeRO divides."""
        return self._member.data_group

    def get_data_parallel_rank(self) -> int:
        """Number of this rank among them."""
        return self._member.replica

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._member.replicas

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        first = self._member.stage * self._member.replicas
        return list(range(first, first + self._member.replicas))

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The stages of this replica, over which the gradient's norm is added up."""
        return self._member.pipe_group

    def get_model_parallel_rank(self) -> int:
        """Number of this rank's stage."""
        return self._member.stage

    def get_model_parallel_world_size(self) -> int:
        """How many stages there are."""
        return self._member.stages
