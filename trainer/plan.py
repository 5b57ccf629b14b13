"""Where each sample of a global batch is computed: ranks, teams and micro-batches. No torch."""

from dataclasses import dataclass

from configs.errors import InputError
from configs.schema import Run


@dataclass(frozen=True)
class Layout:
    """A global batch cut into micro-batches so that every BatchNorm group is one pass of one team of ranks.

    A team is `team` consecutive ranks that share BatchNorm groups (1 when a group fits one micro-batch). A team
    owns a contiguous slice of the global batch; in micro-step a it computes the a-th piece of that slice, each of
    its ranks a contiguous part.
    """

    world: int
    global_batch: int
    micro_batch: int  # samples per rank and pass
    replica_batch: int  # samples per BatchNorm group

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.global_batch // (self.world * self.micro_batch)

    @property
    def team(self) -> int:
        """Ranks that share a BatchNorm group."""
        return max(1, self.replica_batch // self.micro_batch)

    def slices(self, rank: int) -> list[tuple[int, int]]:
        """[start, stop) positions inside the global batch, one pair for each micro-step of `rank`."""
        team, member = divmod(rank, self.team)
        piece = self.team * self.micro_batch
        first = team * self.accumulation * piece + member * self.micro_batch
        return [(first + step * piece, first + step * piece + self.micro_batch) for step in range(self.accumulation)]


def layout(run: Run, world: int) -> Layout:
    """The layout of `run` on `world` ranks.

    Raises:
        InputError: the batch, the micro-batch or the BatchNorm group does not fit `world`, with what would.
    """
    batch, group = run.data.global_batch, run.norm.replica_batch
    if batch % world:
        raise InputError(
            f"data.global_batch = {batch}: {world} ranks do not divide it; nearest world size that does: "
            f"{_nearest_divisor(batch, world)}, nearest batch: {max(1, round(batch / world)) * world}"
        )
    if batch % group:
        raise InputError(
            f"norm.replica_batch = {group}: must divide data.global_batch = {batch}; nearest valid: "
            f"{_nearest_divisor(batch, group)}"
        )
    share = batch // world
    valid = [size for size in range(1, share + 1) if share % size == 0 and _groups_fit(size, group, world)]
    if not valid:
        raise InputError(
            f"norm.replica_batch = {group}: no micro-batch of {world} ranks with {share} samples each can form such "
            f"groups; nearest valid: {_nearest_divisor(share, group)}"
        )
    micro = run.parallel.micro_batch or max(valid)
    if micro not in valid:
        raise InputError(
            f"parallel.micro_batch = {micro}: must divide the rank's share of {share} samples and be a multiple of "
            f"norm.replica_batch = {group}, or divide it with {world} ranks in whole teams; nearest valid: "
            f"{min(valid, key=lambda size: abs(size - micro))}"
        )
    return Layout(world, batch, micro, group)


def _groups_fit(micro: int, group: int, world: int) -> bool:
    """Whether BatchNorm groups of `group` samples are whole in passes of `micro` samples on teams of ranks."""
    return micro % group == 0 or (group % micro == 0 and world % (group // micro) == 0)


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`."""
    return min((size for size in range(1, number + 1) if number % size == 0), key=lambda size: abs(size - wanted))
