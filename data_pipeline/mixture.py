"""Several data sets read together in exact proportions: which sample comes when, and the data set they form.

Version 1 of the mixture, in closed form. Data set d of D has the weight w_d, in lowest terms, and W = sum(w_d).

1. Positions come in cycles of W. In each, data set d has exactly w_d slots; a keyed permutation of the cycle's slots
   (key: seed, cycle) says which. The k-th of its slots in cycle c is the data set's own index c * w_d + k, so that any
   prefix of the mixture holds a prefix of every data set.
2. Own indices go through the data set's own `Order`: every sample comes once in each of its own epochs, whatever the
   others' sizes. Its seed is keyed by (seed, d), its block is its slots in a global batch, block * w_d // W.
3. What is called an epoch of the mixture is as many positions as its data sets have samples; it serves to count the
   schedule and to seed augmentation, and is no permutation.

Where W divides the global batch, every batch holds the same number of samples of each data set, and a rank stays in
the same lanes of each, as with one data set. Else its lanes move from batch to batch: the samples are as exact, but a
node needs more shards over time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np

from configs.data_rules import MAX_CYCLE
from configs.errors import InputError
from configs.schema import Run
from data_pipeline.manifest import Source, Split
from data_pipeline.order import ORDER_VERSION, Order
from data_pipeline.permutation import CYCLES, SOURCES, Ints, keyed, permute

MIXTURE_VERSION = 1
OPENED = 1 << 20  # slots of cycles laid open at a time, to bound memory


class Mixture:
    """The order of the training split of a mixture for one run; an `Order` over all its shards to who reads.

    Args:
        sources: the data sets, as in the split's `sources`.
        counts: samples of each shard of all data sets, (shards,).
        seed: of the run, 0 .. 2**63 - 1.
        block: positions in a block, over all data sets.
        lanes: shards of each data set read side by side, capped as in `Order`.
        piece: samples of a lane that are permuted together.

    Raises:
        InputError: no samples, or a number out of range.
    """

    def __init__(self, sources: Sequence[Source], counts: Ints, seed: int, block: int, lanes: int, piece: int) -> None:
        weights = [source.weight for source in sources]
        if not weights or min(weights) < 1 or sum(weights) > MAX_CYCLE:
            raise InputError(f"mixture: weights {weights}: must be at least 1 and add up to at most {MAX_CYCLE}")
        self.counts, self.seed, self.block, self.lanes, self.piece = counts, seed, block, lanes, piece
        self.samples = int(counts.sum())
        self._sources = tuple(sources)
        self._weights = np.array(weights, dtype=np.int64)
        self._edges = np.concatenate([[0], np.cumsum(self._weights)])
        self._cycle = int(self._edges[-1])
        self._first_shard = np.array([source.first_shard for source in sources], dtype=np.int64)
        seeds = keyed(SOURCES, seed, np.arange(len(weights))) >> np.uint64(1)
        self.orders = tuple(
            Order(shards, int(seeds[number]), max(1, block * int(self._weights[number]) // self._cycle), lanes, piece)
            for number, shards in enumerate(np.split(counts, self._first_shard[1:]))
        )

    def lookup(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """Where the samples at global indices `positions`, (n,), lie: (epoch, shard, sample in the shard), each (n,).

        The epoch is the mixture's (rule 3), the shard counts over all data sets.

        Raises:
            InputError: a negative index.
        """
        g = np.ascontiguousarray(positions, dtype=np.int64).reshape(-1)
        source, own = self.origin(g)
        shard, sample = np.empty_like(g), np.empty_like(g)
        for number in np.unique(source).tolist():
            here = source == number
            _, within, sample[here] = self.orders[number].lookup(own[here])
            shard[here] = within + self._first_shard[number]
        return g // self.samples, shard, sample

    def origin(self, positions: Ints) -> tuple[Ints, Ints]:
        """Whose samples come at global indices `positions`, (n,): (number of the data set, its own index), each (n,).

        Raises:
            InputError: a negative index.
        """
        if positions.size and int(positions.min()) < 0:
            raise InputError(f"order: global index {int(positions.min())}: must not be negative")
        source, own = np.empty_like(positions), np.empty_like(positions)
        cycle, slot = np.divmod(positions, np.int64(self._cycle))
        for here, row, slots in self._opened(cycle):
            place = np.argsort(slots, axis=1)[row, slot[here]]
            source[here] = np.searchsorted(self._edges, place, side="right") - 1
            own[here] = cycle[here] * self._weights[source[here]] + place - self._edges[source[here]]
        return source, own

    def find(self, epoch: Ints, shard: Ints, sample: Ints) -> Ints:
        """Global indices, (n,), at which (shard, sample), each (n,), is seen in `epoch`, (n,), of its own data set.

        Raises:
            InputError: a negative epoch, or a sample that is not there.
        """
        source = np.searchsorted(self._first_shard, shard, side="right") - 1  # -1, so refused below, if negative
        own, slot = np.empty_like(shard), np.empty_like(shard)
        for number in np.unique(source).tolist():
            here = source == number
            own[here] = self.orders[number].find(epoch[here], shard[here] - self._first_shard[number], sample[here])
        cycle, turn = np.divmod(own, self._weights[source])
        for here, row, slots in self._opened(cycle):
            slot[here] = slots[row, (self._edges[source] + turn)[here]]
        found: Ints = cycle * self._cycle + slot
        return found

    def state(self, consumed: int, fingerprint: str) -> dict[str, object]:
        """The whole cursor after `consumed` samples of the split with this `fingerprint`, ready for JSON."""
        return {
            "version": ORDER_VERSION,
            "mixture": MIXTURE_VERSION,
            "fingerprint": fingerprint,
            "samples": self.samples,
            "seed": self.seed,
            "consumed": consumed,
            "block": self.block,
            "lanes": self.lanes,
            "piece": self.piece,
            "sources": _identities(self._sources),
        }

    @classmethod
    def resume(cls, state: Mapping[str, object], split: Split) -> tuple[Self, int]:
        """The mixture that wrote `state`, and the number of samples it had consumed.

        Raises:
            InputError: the state is of another version, mixture or form; the message lists every difference.
        """
        fields = ("version", "mixture", "samples", "seed", "consumed", "block", "lanes", "piece")
        wrong = [name for name in fields if type(state.get(name)) is not int]
        if wrong:
            raise InputError(f"data cursor: not a whole number: {', '.join(wrong)}; take an older checkpoint")
        number = {name: int(str(state[name])) for name in fields}
        here: dict[str, object] = {"version": ORDER_VERSION, "mixture": MIXTURE_VERSION}
        differs = [f"{name} {state[name]!r} (here {mine!r})" for name, mine in here.items() if state[name] != mine]
        differs += _differences(state["sources"], split.sources)
        if not differs and (state.get("fingerprint"), number["samples"]) != (split.fingerprint, split.samples):
            differs = [f"fingerprint {state.get('fingerprint')!r} (here {split.fingerprint!r})"]
        if differs:
            raise InputError(
                f"data cursor: written for another mixture: {'; '.join(differs)}; give data.mixture the data sets and "
                f"weights the run began with, or start a new run"
            )
        if number["consumed"] < 0:
            raise InputError(f"data cursor: consumed = {number['consumed']}: must not be negative")
        shape = number["seed"], number["block"], number["lanes"], number["piece"]
        return cls(split.sources, split.counts, *shape), number["consumed"]

    def _opened(self, cycle: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
        """The distinct cycles among `cycle`, (n,), some at a time: (indices into `cycle`, their rows, slots).

        `slots`, (rows, W), lists the slots of each data set one after the other, ascending within it.
        """
        distinct, number = np.unique(cycle, return_inverse=True)
        step = max(1, OPENED // self._cycle)
        for first in range(0, distinct.size, step):
            some = distinct[first : first + step]
            slot = np.tile(np.arange(self._cycle, dtype=np.int64), some.size)
            key = keyed(CYCLES, self.seed, np.repeat(some, self._cycle))
            image = permute(slot, np.full_like(slot, self._cycle), key)
            source = (np.searchsorted(self._edges, image, side="right") - 1).reshape(some.size, self._cycle)
            here = np.flatnonzero((number >= first) & (number < first + step))
            yield here, number[here] - first, np.argsort(source, axis=1, kind="stable")


def begin(run: Run, split: Split) -> Order | Mixture:
    """The order of a run's training split from its start."""
    shape = run.seed, run.data.global_batch, run.data.lanes, run.data.piece
    return Mixture(split.sources, split.counts, *shape) if split.sources else Order(split.counts, *shape)


def resume(state: Mapping[str, object], split: Split) -> tuple[Order | Mixture, int]:
    """The order that wrote `state`, and the number of samples it had consumed.

    Raises:
        InputError: the state is of another version, data set, mixture or form; the message lists every difference.
    """
    if "sources" not in state and not split.sources:
        return Order.resume(state, split.counts, split.fingerprint)
    if "sources" not in state or not split.sources:
        was, here = ("a mixture", "one data set") if "sources" in state else ("one data set", "a mixture")
        raise InputError(
            f"data cursor: written for {was} (here {here}); give data.path and data.mixture as the run began with, or "
            f"start a new run"
        )
    return Mixture.resume(state, split)


def _identities(sources: Sequence[Source]) -> list[dict[str, object]]:
    """What makes each data set of a mixture the one it is, for the cursor."""
    return [{name: getattr(source, name) for name in ("fingerprint", "samples", "weight")} for source in sources]


def _differences(written: object, sources: Sequence[Source]) -> list[str]:
    """How the data sets of a cursor differ from those that are here."""
    if not isinstance(written, list) or not all(isinstance(entry, dict) for entry in written):
        return ["its data sets are no list of tables"]
    if len(written) != len(sources):
        return [f"{len(written)} data sets (here {len(sources)})"]
    return [
        f"data set {number} ({source.root}): {name} {entry.get(name)!r} (here {mine!r})"
        for number, (entry, source) in enumerate(zip(written, sources, strict=True), 1)
        for name, mine in _identities([source])[0].items()
        if entry.get(name) != mine
    ]
