"""Whether a run's data can be reached from this machine. No torch, but for tars without an index and .beton files."""

from pathlib import Path

from configs.errors import InputError
from configs.finding import Finding
from configs.schema import Run
from configs.tars import resampled
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset
from data_pipeline.synthetic import open_data

ADVICE = "mount it on this node, or give the right --data.path"


def data(run: Run) -> Finding:
    """Open the data set, and read the beginning of its first shard where that is a file."""
    try:
        dataset = _opened(run)
        split = dataset.split("train")
    except (InputError, DataError) as error:
        return Finding("data", "bad", str(error), ADVICE)
    first = Path(split.shard_paths[0]) if len(split.shard_paths) else None
    if first is not None and first.is_file():
        try:
            with first.open("rb") as file:
                file.read(1 << 16)
        except OSError as error:
            return Finding("data", "bad", f"{first}: {error.strerror}", ADVICE)
    return Finding("data", "good", f"{dataset.root}: {split.samples:,} training samples in {len(split.rows)} shards")


def _opened(run: Run) -> Dataset:
    """The data of a run."""
    if resampled(run.data):
        from data_pipeline.resample import resampled_dataset  # imports torch

        return resampled_dataset(run.data)
    return open_data(run)
