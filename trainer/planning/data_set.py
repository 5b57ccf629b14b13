"""How many pictures and classes a run has: from its manifest, from the caller, or from what is published. No torch."""

from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, at_least
from configs.schema import Run
from data_pipeline.errors import DataError
from data_pipeline.manifest import open_dataset
from data_pipeline.synthetic import SHARDS, open_data

# (samples of the training split, classes) by the last part of `data.path` in our recipes: the paper's section 4.1 and
# appendix A.2 (arXiv 2106.04803), classes of JFT-300M and JFT-3B as in Zhai et al., arXiv 2106.04560.
PUBLISHED: dict[str, tuple[int, int]] = {
    "in1k": (1_281_167, 1_000),
    "in21k": (12_700_000, 21_841),
    "jft300m": (300_000_000, 18_291),
    "jft3b": (3_000_000_000, 29_593),
}


@dataclass(frozen=True)
class Size:
    """Of a data set.

    Attributes:
        samples: of the training split.
        origin: where that is known from, for people.
    """

    samples: int
    classes: int
    origin: str


def size(run: Run, samples: int | None = None, classes: int | None = None) -> Size:
    """The size of a run's data set. Whatever the caller says goes before what is read.

    Raises:
        InputError: nobody knows it.
        DataError: there is a data set, and its manifest is damaged.
    """
    if samples is not None:
        at_least("--samples", samples, run.data.global_batch)
    if classes is not None:
        at_least("--classes", classes, 2)
    found = Size(samples, classes, "as given") if samples and classes else _found(run)
    return Size(samples or found.samples, classes or found.classes, found.origin)


def _found(run: Run) -> Size:
    """What the data set itself says, else what is published of one by its name."""
    if run.data.synthetic:
        shards, each = SHARDS["train"]
        return Size(shards * each, run.data.synthetic_classes, "made-up pictures")
    try:
        found = open_dataset(run.data.path, run.data, look=False) if not run.data.mixture else open_data(run)
        return Size(found.split("train").samples, found.classes, f"manifest of {found.root}")
    except DataError:
        known = PUBLISHED.get(Path(run.data.path).name)
        if known is None or Path(run.data.path).is_dir():
            raise
    except InputError as error:
        raise InputError(f"{error}; a plan needs no data: --samples N --classes K") from None
    return Size(*known, f"{run.data.path} is not here; as published of {Path(run.data.path).name}")
