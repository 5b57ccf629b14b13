"""How others read, decode and crop the same JPEGs, for `coatnet bench data`: written as their manuals show it."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import webdataset
from numpy.typing import NDArray
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
    streaming = _package(
        "mosaicml", "streaming", "mosaicml-streaming, into an environment of its own since it asks for an old numpy"
    )
    folder, crop = str(feed.folder / "mosaicml"), random_crop(feed.resolution)
    with streaming.MDSWriter(out=folder, columns={"picture": "bytes", "label": "int"}) as writer:
        for number, picture in enumerate(feed.pictures):
            writer.write({"picture": picture, "label": number})
    samples = streaming.StreamingDataset(local=folder, shuffle=False, batch_size=BATCH)
    return lambda: drain(((crop(decoded(found["picture"])), found["label"]) for found in samples), len(feed.pictures))


def energon(feed: Feed) -> Callable[[], object]:
    """megatron-energon in this process, over the same pictures in one tar with its index, one after the other.

    Raises:
        InputError: the package is missing.
    """
    found = _package("energon", "megatron.energon", "megatron-energon")
    flavors = _package("energon", "megatron.energon.flavors", "megatron-energon")
    folder, crop = feed.folder / "energon", random_crop(feed.resolution)
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "all.tar"), encoder=False) as writer:
        for number, picture in enumerate(feed.pictures):
            writer.write({"__key__": f"{number:08d}", "jpg": picture, "cls": b"%d" % number})
    whole = [("train", "all.tar")]
    flavors.BaseWebdatasetFactory.prepare_dataset(folder, ["all.tar"], split_parts_patterns=whole, workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    @found.stateless  # type: ignore[untyped-decorator]
    def view(sample: dict[str, Any]) -> Any:
        return found.TextSample(**found.basic_sample_keys(sample), text=(crop(decoded(sample["jpg"])), sample["cls"]))

    encoder = type("Encoder", (found.DefaultTaskEncoder,), {"decoder": None, "cookers": [found.Cooker(view)]})
    samples = found.get_loader(
        found.get_val_dataset(
            str(folder),
            split_part="train",
            worker_config=found.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            task_encoder=encoder(),
        )
    )

    def drained() -> None:
        found = iter(samples)
        drain((sample.text for sample in found), len(feed.pictures))
        assert next(found, None) is None  # else the next round would begin where this one stopped

    return drained


class Pixels:
    """The pictures decoded, by number, as FFCV's writer asks for them: uint8 (H, W, 3) and a label."""

    def __init__(self, feed: Feed) -> None:
        self._pictures = feed.pictures

    def __len__(self) -> int:
        """Pictures."""
        return len(self._pictures)

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint8], int]:
        """Picture `number`, and it."""
        return np.ascontiguousarray(decoded(self._pictures[number]).permute(1, 2, 0).numpy()), number


def ffcv(feed: Feed) -> Callable[[], object]:
    """FFCV, one thread, over the same pictures written again as JPEGs of their full size: its own crop, flip, batches.

    Raises:
        InputError: the package is missing.
    """
    advice = "ffcv numba pillow, after apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++"
    names = ("writer", "loader", "fields", "fields.decoders", "transforms")
    writer, loader, fields, decoders, transforms = (_package("ffcv", f"ffcv.{name}", advice) for name in names)
    ours, path, size = Augment(), str(feed.folder / "all.beton"), (feed.resolution, feed.resolution)
    columns = {"image": fields.RGBImageField(write_mode="jpg", jpeg_quality=90), "label": fields.IntField()}
    writer.DatasetWriter(path, columns, num_workers=1).from_indexed_dataset(Pixels(feed))
    crop = decoders.RandomResizedCropRGBImageDecoder(size, ours.crop_scale, ours.crop_ratio)
    flip, tensor, channels_first = transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.ToTorchImage()
    batches = loader.Loader(
        path,
        batch_size=BATCH,
        num_workers=1,
        order=loader.OrderOption.SEQUENTIAL,
        os_cache=True,
        pipelines={
            "image": [crop, flip, tensor, channels_first],
            "label": [decoders.IntDecoder(), transforms.ToTensor()],
        },
    )

    def drained() -> None:
        seen = sum(len(labels) for _, labels in batches)
        assert seen == len(feed.pictures)

    return drained


def _package(reader: str, module: str, what: str) -> Any:
    """A module of somebody's package.

    Args:
        reader: the value of --against.
        module: its name.
        what: to give to pip.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise InputError(f"--against {reader}: {error}; pip install {what}") from None


OTHERS: dict[str, Callable[[Feed], Callable[[], object]]] = {
    "webdataset": plain_webdataset,
    "mosaicml": mosaicml,
    "energon": energon,
    "ffcv": ffcv,
}
