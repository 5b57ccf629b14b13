"""How others read, decode and crop the same JPEGs, for `coatnet bench data`: written as their manuals show it."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
import webdataset
from torchvision.transforms import v2

from configs.errors import InputError
from configs.schema import Augment
from data_pipeline.manifest import Dataset
from data_pipeline.shard import OpenShards

BATCH = 64  # samples put together, by all
JPEGS = ("jpg", "jpeg")

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Feed:
    """What all work through: samples by their `places`, (shard, number), and their pictures' bytes; a folder to use."""

    dataset: Dataset
    shards: OpenShards
    places: tuple[tuple[int, int], ...]
    pictures: tuple[bytes, ...]
    resolution: int
    folder: Path


def decode_and_crop(feed: Feed) -> None:
    """torchvision's decoder and transforms over bytes in memory: no reading, no checks, no batches."""
    crop = random_crop(feed.resolution)
    for picture in feed.pictures:
        crop(decoded(picture))


def decoded(picture: bytes) -> torch.Tensor:
    """A JPEG through torchvision: uint8 (3, H, W)."""
    encoded = torch.frombuffer(bytearray(picture), dtype=torch.uint8)
    pixels_CHW = torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
    assert isinstance(pixels_CHW, torch.Tensor)
    return pixels_CHW


def random_crop(size: int) -> Transform:
    """torchvision's random-resized crop and flip, of the ranges and the interpolation that ours has."""
    ours, bicubic = Augment(), v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, ours.crop_scale, ours.crop_ratio, interpolation=bicubic, antialias=True)
    transform: Transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return transform


def drain(samples: Iterable[Any], count: int) -> None:
    """Put together `count` of `samples`, (picture, label), as batches."""
    found: Iterator[Any] = iter(samples)
    for _ in range(count // BATCH):
        torch.stack([next(found)[0] for _ in range(BATCH)])


def plain_webdataset(feed: Feed) -> Callable[[], object]:
    """webdataset over the same tars, one after the other."""
    crop, paths = random_crop(feed.resolution), list(feed.dataset.split("train").shard_paths)

    def view(sample: dict[str, bytes]) -> tuple[torch.Tensor, bytes]:
        picture = next(sample[extension] for extension in JPEGS if extension in sample)
        return crop(decoded(picture)), sample.get("cls") or sample["json"]

    return lambda: drain(webdataset.WebDataset(paths, shardshuffle=False).map(view), len(feed.pictures))


def mosaicml(feed: Feed) -> Callable[[], object]:
    """MosaicML's streaming, over the same pictures written in its own format, one after the other.

    Raises:
        InputError: the package is missing.
    """
    try:
        streaming = importlib.import_module("streaming")
    except ImportError as error:
        raise InputError(
            f"--against mosaicml: {error}; pip install mosaicml-streaming, into an environment of its own since it "
            f"asks for an old numpy"
        ) from None
    folder, crop = str(feed.folder / "mosaicml"), random_crop(feed.resolution)
    with streaming.MDSWriter(out=folder, columns={"picture": "bytes", "label": "int"}) as writer:
        for number, picture in enumerate(feed.pictures):
            writer.write({"picture": picture, "label": number})
    samples = streaming.StreamingDataset(local=folder, shuffle=False, batch_size=BATCH)
    return lambda: drain(((crop(decoded(found["picture"])), found["label"]) for found in samples), len(feed.pictures))


OTHERS: dict[str, Callable[[Feed], Callable[[], object]]] = {"webdataset": plain_webdataset, "mosaicml": mosaicml}
