"""Where each sample of a global batch is computed: stages, replicas, teams and micro-batches. No torch."""

from dataclasses import dataclass

from configs.errors import InputError
from configs.schema import Run


@dataclass(frozen=True)
class Layout:
    """A global batch cut into micro-batches so that every BatchNorm group is one pass of one team of replicas.

    A replica is one rank, or with a pipeline one rank for each stage, that computes whole micro-batches. A team is
    `team` consecutive replicas that share BatchNorm groups (1 when a group fits one micro-batch). A team owns a
    contiguous slice of the global batch; in micro-step a it computes the a-th piece of that slice, each of its
    replicas a contiguous part.
    """

    world: int
    global_batch: int
    micro_batch: int  # samples per replica and pass
    replica_batch: int  # samples per BatchNorm group
    stages: int = 1  # of the pipeline

    @property
    def replicas(self) -> int:
        """Ranks over which the global batch is divided."""
        return self.world // self.stages

    @property
    def accumulation(self) -> int:
        """Micro-batches per replica and optimizer step."""
        return self.global_batch // (self.replicas * self.micro_batch)

    @property
    def team(self) -> int:
        """Replicas that share a BatchNorm group."""
        return max(1, self.replica_batch // self.micro_batch)

    def slices(self, replica: int) -> list[tuple[int, int]]:
        """[start, stop) positions inside the global batch, one pair for each micro-step of `replica`."""
        team, member = divmod(replica, self.team)
        piece = self.team * self.micro_batch
        first = team * self.accumulation * piece + member * self.micro_batch
        return [(first + step * piece, first + step * piece + self.micro_batch) for step in range(self.accumulation)]


def layout(run: Run, world: int) -> Layout:
    """The layout of `run` on `world` ranks.

    Where the run leaves the micro-batch open it is the largest that fits; in a pipeline the largest of which there are
    twice as many as stages, so that at most a third of the time is spent filling and draining it, or else the smallest.

    Raises:
        InputError: the stages, the batch, the micro-batch or the BatchNorm group do not fit `world`, with what would.
    """
    batch, group, stages = run.data.global_batch, run.norm.replica_batch, run.parallel.pipeline
    refuse_mesh(stages, world)
    replicas = world // stages
    refuse_shard_group(run.parallel.shard_group, replicas)
    if batch % replicas:
        raise InputError(
            f"data.global_batch = {batch}: {replicas} ranks do not divide it; nearest world size that does: "
            f"{_nearest_divisor(batch, replicas) * stages}, nearest batch: {max(1, round(batch / replicas)) * replicas}"
        )
    if batch % group:
        raise InputError(
            f"norm.replica_batch = {group}: must divide data.global_batch = {batch}; nearest valid: "
            f"{_nearest_divisor(batch, group)}"
        )
    share = batch // replicas
    valid = micro_batches(run, world)
    if not valid:
        raise InputError(
            f"norm.replica_batch = {group}: no micro-batch of {replicas} ranks with {share} samples each can form such "
            f"groups; nearest valid: {_nearest_divisor(share, group)}"
        )
    deep = [size for size in valid if stages == 1 or share // size >= 2 * stages]
    micro = run.parallel.micro_batch or max(deep, default=min(valid))
    if micro not in valid:
        raise InputError(
            f"parallel.micro_batch = {micro}: must divide the rank's share of {share} samples and be a multiple of "
            f"norm.replica_batch = {group}, or divide it with {replicas} ranks in whole teams; nearest valid: "
            f"{min(valid, key=lambda size: abs(size - micro))}"
        )
    return Layout(world, batch, micro, group, stages)


def micro_batches(run: Run, world: int) -> list[int]:
    """The micro-batches that a layout on `world` ranks can have, ascending; none where ranks or groups do not fit."""
    batch, group, stages = run.data.global_batch, run.norm.replica_batch, run.parallel.pipeline
    replicas, left = divmod(world, stages)
    if left or batch % replicas or batch % group:
        return []
    share = batch // replicas
    return [size for size in range(1, share + 1) if share % size == 0 and _groups_fit(size, group, replicas)]


def refuse_mesh(stages: int, world: int) -> None:
    """Refuse stages that do not divide the ranks.

    Raises:
        InputError: with the nearest number that does.
    """
    if world % stages:
        raise InputError(
            f"parallel.pipeline = {stages}: must divide the {world} ranks; nearest valid: "
            f"{_nearest_divisor(world, stages)}, or {-(-world // stages) * stages} ranks"
        )


def refuse_shard_group(group: int, replicas: int) -> None:
    """Refuse groups of ranks, each with its own copy of the weights in pieces, that are not several and equal.

    Raises:
        InputError: with the nearest number of ranks in a group that works, 0 for none.
    """
    fitting = [size for size in range(2, replicas) if replicas % size == 0]
    if group and group not in fitting:
        raise InputError(
            f"parallel.shard_group = {group}: must divide the {replicas} ranks into two groups or more; nearest valid: "
            f"{min(fitting, key=lambda size: abs(size - group), default=0)}"
        )


def _groups_fit(micro: int, group: int, world: int) -> bool:
    """Whether BatchNorm groups of `group` samples are whole in passes of `micro` samples on teams of ranks."""
    return micro % group == 0 or (group % micro == 0 and world % (group // micro) == 0)


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`."""
    return min((size for size in range(1, number + 1) if number % size == 0), key=lambda size: abs(size - wanted))
