"""What a check of a data set finds: in which shard, at which sample, and why."""

from dataclasses import dataclass

from configs.schema import Data
from data_pipeline.errors import DataError

WHOLE_SHARD = -1  # the sample number of a finding that is not about one sample


@dataclass(frozen=True)
class Finding:
    """Something wrong: in shard `shard` (path relative to the data set) at `sample` (-1: the whole shard)."""

    shard: str
    sample: int
    key: str  # empty where it cannot be read
    reason: str  # a whole sentence that names the place too


@dataclass(frozen=True)
class Report:
    """What was read and what is wrong with it, one line per finding; `per_shard` has the findings of bad shards."""

    root: str
    shards: int
    samples: int
    bytes: int
    problems: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    per_shard: tuple[tuple[str, int], ...] = ()
    decoded: int = 0  # pictures decoded without fault


def decode_whole(picture: bytes, where: str) -> None:
    """Decode a picture as training would.

    Raises:
        DataError: it cannot be decoded.
    """
    from data_pipeline.decode import decode  # here, because it imports torch

    try:
        decode(picture, Data().max_pixels)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
