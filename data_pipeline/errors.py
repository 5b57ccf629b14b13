"""The data room's family of errors."""

from configs.errors import InputError


class DataError(InputError):
    """Missing, damaged or foreign data: names the file and, inside a shard, the sample, its key and its offset."""


class StoreError(DataError):
    """A shard, or another file of a data set, cannot be had whole: missing, out of reach, or not what was recorded.

    Never replaced by other samples, because ranks would disagree on which: the run stops and continues later.
    """


class Damage(DataError):
    """A sample whose own stored bytes prove that it cannot be used: the same for whoever reads them, and for ever.

    The one error that `data.on_damage = "replace"` answers with another sample.

    Attributes:
        key: of the sample; empty where it cannot be read.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key
