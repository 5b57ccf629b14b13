"""Damaged samples of a run: what stands in for them, where they are written down, and when they are too many.

With `data.on_damage = "replace"`, a position whose sample is proven damaged by its own bytes reads another sample, the
first good one of `stand_ins`. That is a function of (seed, epoch, position) and of the data alone, so that every rank,
at any number of ranks and workers, reads the same; the crop and the mixture stay those of the position. Nothing is
skipped and nothing moves: every position of an epoch delivers a sample, and every damaged one has a line in

    <run folder>/bad-samples.jsonl        shard, sample (its number in it), key, reason, time; one line per sample

which all processes of the run append to, and which later parts of the run count on. Damaged samples are read again
whenever their turn comes, so that repaired shards are used as soon as they are there.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipeline.errors import Damage, DataError
from data_pipeline.permutation import STAND_INS, Ints, keyed

FILE = "bad-samples.jsonl"
NEAR = 8  # stand-ins from the following positions, which mostly lie in shards that are open anyway
FAR = 8  # and from anywhere, should a whole shard be damaged


def stand_ins(index: int, samples: int, seed: int) -> Ints:
    """Global indices, (NEAR + FAR,), whose samples may stand in for the one at `index`, the first good one does.

    Args:
        index: global index over the run.
        samples: of an epoch; stand-ins are of the same.
        seed: of the order.
    """
    epoch, position = divmod(index, samples)
    anywhere = keyed(STAND_INS, seed, np.full(FAR, epoch), np.full(FAR, position), np.arange(FAR)) % np.uint64(samples)
    return epoch * samples + np.concatenate([position + np.arange(1, NEAR + 1), anywhere.astype(np.int64)]) % samples


class BadSamples:
    """The damaged samples of a run, as all its processes know them.

    Args:
        folder: of the run; made with the first damage.
        budget: distinct samples that may be damaged until the run stops.
    """

    def __init__(self, folder: str, budget: int) -> None:
        self.path, self._budget = Path(folder) / FILE, budget
        self._known: set[tuple[str, int]] = set()
        self._read = 0  # bytes of the file that `_known` holds

    def note(self, shard: str, sample: int, damage: Damage) -> None:
        """Write a damaged sample down, unless it is.

        Raises:
            DataError: it is one too many, or cannot be written down.
        """
        if (shard, sample) in self._known:
            return
        try:
            with self._held() as descriptor:
                self._learn(descriptor)
                if (shard, sample) in self._known:
                    return
                if len(self._known) >= self._budget:
                    raise DataError(
                        f"{damage}\n{self.path} lists {len(self._known)} damaged samples before it, and "
                        f"data.damage_budget = {self._budget}: `coatnet data verify` finds all of them; repair the "
                        f"shards, or raise the budget"
                    )
                facts = {"shard": shard, "sample": sample, "key": damage.key, "reason": str(damage)}
                line = json.dumps({**facts, "time": time.time()}) + "\n"
                os.write(descriptor, line.encode())  # one write at the file's end: lines of two writers never mix
                self._known.add((shard, sample))
        except OSError as error:
            raise DataError(f"{self.path}: a damaged sample cannot be written down: {error}\n{damage}") from error

    @contextmanager
    def _held(self) -> Iterator[int]:
        """The file, open, and closed to other processes of the run where the file system knows locks.

        Without locks two processes that meet one sample at once would both write it down; it still counts once.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                locked = False
            else:
                locked = True
            yield descriptor
            if locked:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _learn(self, descriptor: int) -> None:
        """Read the lines written since the last look; a line that a killed process left half written is ended."""
        data = os.pread(descriptor, os.fstat(descriptor).st_size - self._read, self._read)
        if data and not data.endswith(b"\n"):
            os.write(descriptor, b"\n")
            data += b"\n"
        self._read += len(data)
        self._known |= _samples(data)


def count(folder: str | Path) -> int:
    """How many distinct samples a run has found damaged so far."""
    path = Path(folder) / FILE
    return len(_samples(path.read_bytes())) if path.exists() else 0


def _samples(lines: bytes) -> set[tuple[str, int]]:
    """(shard, sample) of every whole line."""
    found = set()
    for line in lines.splitlines():
        try:
            facts = json.loads(line)
            found.add((str(facts["shard"]), int(facts["sample"])))
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill: its sample is found, and written down, again
    return found
