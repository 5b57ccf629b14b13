"""The global batches that a run leaves out, and so which batch each update takes. No torch.

Update number u, counted from 0, takes the u-th batch of the order that is not left out. Batches are left out behind
the cursor's position only, so that what earlier updates took stays true.
"""

from collections.abc import Iterable, Iterator


class Skipped:
    """Ranges of batch numbers that no update takes.

    Attributes:
        ranges: [first, last) of each, sorted, without overlap or touch.
    """

    def __init__(self, ranges: Iterable[Iterable[int]] = ()) -> None:
        self.ranges: list[tuple[int, int]] = []
        for first, last in ranges:
            self.add(first, last)

    def add(self, first: int, last: int) -> None:
        """Leave out the batches [first, last) too."""
        apart = [row for row in self.ranges if row[1] < first or last < row[0]]
        joined = [row for row in self.ranges if row not in apart] + [(first, last)]
        self.ranges = sorted([*apart, (min(low for low, _ in joined), max(high for _, high in joined))])

    def batch(self, update: int) -> int:
        """The batch that update number `update` takes; before it, that is where the data's cursor stands."""
        for first, last in self.ranges:
            if update < first:
                break
            update += last - first
        return update

    def update(self, batch: int) -> int | None:
        """The number of the update that takes a batch; None: no update does."""
        before = [(first, last) for first, last in self.ranges if first <= batch]
        if before and batch < before[-1][1]:
            return None
        return batch - sum(last - first for first, last in before)

    def stretches(self, update: int, count: int) -> Iterator[tuple[int, int]]:
        """The batches of `count` updates from number `update` on, as (first batch, how many) of each gapless piece."""
        while count > 0:
            first = self.batch(update)
            gap = next((low for low, _ in self.ranges if low > first), None)
            length = count if gap is None else min(count, gap - first)
            yield first, length
            update, count = update + length, count - length

    def state(self) -> list[list[int]]:
        """The ranges, ready for JSON."""
        return [list(row) for row in self.ranges]
