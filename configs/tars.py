"""The settings of tars that are read without an index (`data_pipeline.resample`), and what they rule out."""

from configs.errors import InputError
from configs.schema import Data

TARS = "tars:"  # what such a `data.path` begins with
EXACT = ("mixture", "lanes", "piece", "pipe")  # of the exact order, and of our own fetching


def resampled(data: Data) -> bool:
    """Whether the training split is tars without an index."""
    return data.path.startswith(TARS) and not data.synthetic


def check_tars(data: Data) -> None:
    """Refuse tars without what no index says of them, or with settings that have no meaning for them; and the reverse.

    Raises:
        InputError: see above.
    """
    plain = Data()
    if not data.path.startswith(TARS):
        for name in ("heldout", "tar_samples"):
            if getattr(data, name) != getattr(plain, name):
                raise InputError(
                    f"data.{name} = {getattr(data, name)!r}: belongs to data.path = '{TARS}PATTERN', tars without an "
                    f"index; nearest valid: {getattr(plain, name)!r}"
                )
        inside = [entry for entry in data.mixture if entry.startswith(TARS)]
        if inside:
            raise InputError(f"data.mixture = {inside[0]!r}: tars without an index cannot be mixed; adopt them first")
        return
    if data.synthetic:
        return
    for name in EXACT:
        if getattr(data, name) != getattr(plain, name):
            raise InputError(
                f"data.{name} = {getattr(data, name)!r}: has no meaning for tars without an index, data.path = "
                f"{data.path!r}; nearest valid: {getattr(plain, name)!r}"
            )
    if not data.heldout or data.heldout.startswith(TARS):
        raise InputError(
            f"data.heldout = {data.heldout!r}: must be the data set whose held-out split is scored and whose classes "
            f"are those of the tars (`coatnet data build` or `adopt` makes one), because data.path = {data.path!r}"
        )
    if data.tar_samples < 1:
        raise InputError(
            f"data.tar_samples = {data.tar_samples}: must be the samples that count as an epoch, such as 1281167, "
            f"because no index says how many there are in data.path = {data.path!r}"
        )
