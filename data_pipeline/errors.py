"""The data room's family of errors."""

from configs.errors import InputError


class DataError(InputError):
    """Missing, damaged or foreign data: names the file and, inside a shard, the sample, its key and its offset."""
