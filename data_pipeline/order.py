"""Which sample comes when: a pure function of (seed, epoch, position). No torch, no files.

Version 1 of the order, in closed form. N samples lie in shards of given counts; g counts samples over the whole run.

1. epoch = g // N and position p = g % N. Batches run on over the end of an epoch: the batch at the seam holds the
   last samples of one epoch and the first of the next. So every epoch is a permutation and no sample is dropped.
2. The shards are permuted by a keyed Feistel network (key: seed, epoch). Their samples, concatenated in that order,
   are the epoch's line of N samples.
3. Positions come in blocks of `block` (the recipe's global batch at the start of the run). Slot i of a block belongs
   to lane v if b_v <= i < b_{v+1}, with b_v = ceil(v * block / V), that is v = i * V // block.
4. Lane v owns the line's range [b_v * N // block, b_{v+1} * N // block). With T = N // block full blocks and
   r = N % block, full block t takes samples q_v * t .. q_v * (t + 1) - 1 of the lane, q_v = b_{v+1} - b_v. The last,
   partial block of r positions takes what remains of each lane, b_{v+1} * r // block - b_v * r // block samples, in
   lane order. b_v * N // block = b_v * T + b_v * r // block, so a lane is used up exactly.
5. Within a lane, samples are permuted in pieces of K (the last piece is shorter) by a keyed Feistel network
   (key: seed, epoch, lane, piece).

A contiguous slice of a batch therefore touches few lanes, each of which reads one shard after the other (at most two
or three open at a time), and the batch at g is the same whatever the number of ranks. Rank r of W reads slots
[r * block / W, (r + 1) * block / W): V / W lanes where W divides V, at most ceil(V / W) + 1 where it does not. The
partial block at the end of an epoch moves the next epoch's lanes against the slots, once: up to two lanes more.

Every step has an inverse, so `find` answers just as directly when a sample is seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from configs.errors import InputError
from data_pipeline.permutation import AUGMENT, PIECES, SHARDS, Ints, keyed, permute, restore

__all__ = ["ORDER_VERSION", "Ints", "Order", "keyed", "permute", "sample_seed"]

ORDER_VERSION = 1


@dataclass(frozen=True, eq=False)
class Line:
    """One epoch's shards in order: `shards[j]` holds the line's samples [starts[j], starts[j + 1])."""

    shards: Ints
    starts: Ints


class Order:
    """The order of one split for one run.

    Args:
        counts: samples of each shard, (shards,).
        seed: of the run, 0 .. 2**63 - 1.
        block: positions in a block.
        lanes: shards read side by side; capped at `block` and at the number of shards that hold samples, because
            more lanes than shards would open each shard more than once without mixing better.
        piece: samples of a lane that are permuted together.

    Raises:
        InputError: no samples, or a number out of range.
    """

    def __init__(self, counts: Ints, seed: int, block: int, lanes: int, piece: int) -> None:
        self.counts = np.ascontiguousarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or (self.counts < 0).any() or not self.counts.any():
            raise InputError("order: the counts of the shards must be a list of numbers >= 0 with a positive sum")
        self.samples = int(self.counts.sum())
        for name, value in (("block", block), ("lanes", lanes), ("piece", piece)):
            if value < 1:
                raise InputError(f"order: {name} = {value}: must be at least 1; nearest valid: 1")
        if not 0 <= seed < 2**63:
            raise InputError(f"order: seed = {seed}: must be between 0 and 2**63 - 1")
        if max(block * self.samples, block * min(lanes, block)) >= 2**63:
            raise InputError(f"order: block = {block}: block * samples must stay below 2**63 = {2**63}")
        self.seed, self.block, self.piece = seed, block, piece
        self.lanes = min(lanes, block, int(np.count_nonzero(self.counts)))
        self._first_slot = -(-np.arange(self.lanes + 1, dtype=np.int64) * block // self.lanes)  # b_v
        self._leftover_before = self._first_slot * (self.samples % block) // block  # slots in a partial block, (V + 1,)
        self._lane_start = self._first_slot * (self.samples // block) + self._leftover_before  # on the line, (V + 1,)
        self._lines: dict[int, Line] = {}

    def lookup(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """Where the samples at global indices `positions`, (n,), lie: (epoch, shard, sample in the shard), each (n,).

        Raises:
            InputError: a negative index.
        """
        g = np.ascontiguousarray(positions, dtype=np.int64).reshape(-1)
        if g.size and int(g.min()) < 0:
            raise InputError(f"order: global index {int(g.min())}: must not be negative")
        epoch, position = np.divmod(g, np.int64(self.samples))
        on_line = self._on_line(epoch, position)
        shard, sample = np.empty_like(g), np.empty_like(g)
        for each in np.unique(epoch).tolist():
            line = self._line(each)
            here = epoch == each
            rank = np.searchsorted(line.starts, on_line[here], side="right") - 1
            shard[here] = line.shards[rank]
            sample[here] = on_line[here] - line.starts[rank]
        return epoch, shard, sample

    def find(self, epoch: Ints, shard: Ints, sample: Ints) -> Ints:
        """Global indices, (n,), at which the samples of the `lookup` (epoch, shard, sample), each (n,), are seen.

        Raises:
            InputError: a negative epoch, or a sample that is not there.
        """
        known = (epoch >= 0) & (shard >= 0) & (shard < self.counts.size) & (sample >= 0)
        if not (known.all() and (sample < self.counts[shard]).all()):
            raise InputError("order: epochs must not be negative, shards and samples within the data set")
        on_line = np.empty_like(shard)
        for each in np.unique(epoch).tolist():
            here = epoch == each
            line, size = self._line(each), np.full(np.count_nonzero(here), self.counts.size, dtype=np.int64)
            rank = restore(shard[here], size, keyed(SHARDS, self.seed, epoch[here]))
            on_line[here] = line.starts[rank] + sample[here]
        found: Ints = epoch * self.samples + self._position(epoch, on_line)
        return found

    def state(self, consumed: int, fingerprint: str) -> dict[str, int | str]:
        """The whole cursor after `consumed` samples of the split with this `fingerprint`, ready for JSON."""
        return {
            "version": ORDER_VERSION,
            "fingerprint": fingerprint,
            "samples": self.samples,
            "seed": self.seed,
            "consumed": consumed,
            "block": self.block,
            "lanes": self.lanes,
            "piece": self.piece,
        }

    @classmethod
    def resume(cls, state: Mapping[str, object], counts: Ints, fingerprint: str) -> tuple[Self, int]:
        """The order that wrote `state`, and the number of samples it had consumed.

        Raises:
            InputError: the state is of another version, split or form; the message lists every difference.
        """
        fields = ("version", "samples", "seed", "consumed", "block", "lanes", "piece")
        wrong = [name for name in fields if type(state.get(name)) is not int]
        if wrong:
            raise InputError(f"data cursor: not a whole number: {', '.join(wrong)}; take an older checkpoint")
        number = {name: int(str(state[name])) for name in fields}
        here = {"version": ORDER_VERSION, "fingerprint": fingerprint, "samples": int(np.sum(counts))}
        differs = [
            f"{name} {state.get(name)!r} (here {mine!r})" for name, mine in here.items() if state.get(name) != mine
        ]
        if differs:
            raise InputError(
                f"data cursor: written for other data: {'; '.join(differs)}; point data.path at the data set the "
                f"run began with, or start a new run"
            )
        if number["consumed"] < 0:
            raise InputError(f"data cursor: consumed = {number['consumed']}: must not be negative")
        order = cls(counts, number["seed"], number["block"], number["lanes"], number["piece"])
        return order, number["consumed"]

    def _on_line(self, epoch: Ints, position: Ints) -> Ints:
        """Index on the epoch's line of each position: rules 3 to 5 of the module's docstring."""
        first, leftover = self._first_slot, self._leftover_before
        block, slot = np.divmod(position, np.int64(self.block))
        in_full = block < self.samples // self.block
        lane = np.where(in_full, slot * self.lanes // self.block, 0)
        lane[~in_full] = np.searchsorted(leftover, slot[~in_full], side="right") - 1
        before = np.where(in_full, first[lane], leftover[lane])
        piece, inside = np.divmod((first[lane + 1] - first[lane]) * block + slot - before, np.int64(self.piece))
        mixed = permute(inside, self._piece_size(lane, piece), keyed(PIECES, self.seed, epoch, lane, piece))
        on_line: Ints = self._lane_start[lane] + piece * self.piece + mixed
        return on_line

    def _position(self, epoch: Ints, on_line: Ints) -> Ints:
        """The position in the epoch of each index on its line: `_on_line` backwards."""
        first, leftover = self._first_slot, self._leftover_before
        lane = np.searchsorted(self._lane_start, on_line, side="right") - 1
        piece, mixed = np.divmod(on_line - self._lane_start[lane], np.int64(self.piece))
        inside = restore(mixed, self._piece_size(lane, piece), keyed(PIECES, self.seed, epoch, lane, piece))
        offset, width = piece * self.piece + inside, first[lane + 1] - first[lane]
        block = np.minimum(offset // width, self.samples // self.block)
        before = np.where(block < self.samples // self.block, first[lane], leftover[lane])
        position: Ints = block * self.block + before + offset - block * width
        return position

    def _piece_size(self, lane: Ints, piece: Ints) -> Ints:
        """Samples in each lane's piece: `self.piece`, less in the last."""
        length = self._lane_start[lane + 1] - self._lane_start[lane]
        size: Ints = np.minimum(self.piece, length - piece * self.piece)
        return size

    def _line(self, epoch: int) -> Line:
        """The epoch's line; the last two are kept, because a batch may straddle two epochs."""
        if epoch not in self._lines:
            while len(self._lines) > 1:
                del self._lines[max(self._lines, key=lambda kept: abs(kept - epoch))]
            index = np.arange(self.counts.size, dtype=np.int64)
            shards = permute(
                index, np.full_like(index, index.size), keyed(SHARDS, self.seed, np.full_like(index, epoch))
            )
            self._lines[epoch] = Line(shards, np.concatenate([[0], np.cumsum(self.counts[shards])]))
        return self._lines[epoch]


def sample_seed(seed: int, epoch: Ints, position: Ints) -> Ints:
    """Seeds, (n,), 0 .. 2**63 - 1, of augmentation and drop-path: a function of (seed, epoch, position) alone.

    Args:
        seed: of the run.
        epoch: (n,).
        position: within the epoch, (n,).
    """
    return (keyed(AUGMENT, seed, epoch, position) >> np.uint64(1)).astype(np.int64)
