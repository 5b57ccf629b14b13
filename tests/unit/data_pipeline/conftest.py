"""A small data set of real files in several forms, and runs that read it."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.schema import Augment, Cluster, Data, Evaluate, Model, Run
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.manifest import Dataset

RunOf = Callable[..., Run]


def encoded(number: int) -> bytes:
    """A picture of its own size and pixels: every third a JPEG, the others PNG."""
    noise = np.random.default_rng(number).integers(0, 256, (20 + number % 17, 30 + number % 11, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="JPEG" if number % 3 == 0 else "PNG")
    return file.getvalue()


def picture(number: int, labels: tuple[int, ...] | None = None) -> Picture:
    """Number `number` of the data set, with one label unless others are given."""
    key = f"class/picture-{number}"
    extension = "jpg" if number % 3 == 0 else "png"
    return Picture(key, extension, labels if labels is not None else (number % 3,), key, partial(encoded, number))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """70 pictures of 3 classes in shards of 6."""
    pictures = [picture(number) for number in range(70)]
    out = tmp_path_factory.mktemp("data") / "set"
    return write_dataset(pictures, out, ["a", "b", "c"], "single", {"source": "test"}, 6)


@pytest.fixture
def picture_of() -> Callable[..., Picture]:
    """The pictures the data set was made from, by number."""
    return picture


@pytest.fixture
def run_of(dataset: Dataset) -> RunOf:
    """A run over the data set, by number of workers and augmentation."""

    def build(workers: int = 0, augment: Augment | None = None, path: str | Path = dataset.root) -> Run:
        return Run(
            seed=3,
            model=Model(resolution=32),
            data=Data(path=str(path), global_batch=12, workers=workers, lanes=5, piece=4),
            augment=augment or Augment(randaugment_layers=2, randaugment_magnitude=15),
            evaluate=Evaluate(micro_batch=4),
            cluster=Cluster(device="cpu"),
        )

    return build
