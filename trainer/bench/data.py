"""What one core of this machine reads, decodes and crops of a data set, beside others' ways: `coatnet bench data`.

All cases work through as many samples of the training split in one process and one thread, and are timed by the
process's CPU time, which other processes disturb least. The files are in the page cache from the warm-up on: what a
disk or a network adds is not measured.
"""

import gc
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configs.errors import InputError
from configs.schema import Cluster, Data, Model, Run
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.decode import decode
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.order import Order
from data_pipeline.prefetch import Fetched
from data_pipeline.stream import train_loader
from models import cost, spec
from trainer.bench import record as bench
from trainer.bench.others import BATCH, OTHERS, Feed, decode_and_crop
from trainer.machine import devices, environment

MADE_UP = 512  # pictures read of the made-up data set, of 500 x 400 pixels
GPUS, DEVICE, MFU = 8, "NVIDIA H100", 0.4  # what a verdict takes for granted
LIMIT = "decode + crop alone"


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        path: folder of the data set; empty: one is made up.
        against: others' readers, of `bench_others.OTHERS`.
        recipe: lends its network, resolution and augmentation to a case of its own; empty: none.
        pictures: samples read in a round, at most, in whole batches.
        resolution: pixels of a crop's side.
    """

    path: str = ""
    against: tuple[str, ...] = ()
    recipe: str = ""
    pictures: int = MADE_UP
    resolution: int = 224
    rounds: int = 7

    @property
    def command(self) -> str:
        """The words that measure this again."""
        words = ["coatnet bench data", *([self.path] if self.path else [])]
        words += [f"--against {' '.join(self.against)}"] if self.against else []
        words += [f"--recipe {self.recipe}"] if self.recipe else []
        return " ".join([*words, f"--pictures {self.pictures} --resolution {self.resolution} --rounds {self.rounds}"])


def measure(settings: Settings, recipe: Run | None = None) -> bench.Record:
    """Alternated rates of all cases, in samples per second of one core's time.

    Raises:
        InputError: no such data set or too small a one, others' readers over other files than JPEGs, or not installed.
    """
    threads, folder = torch.get_num_threads(), tempfile.mkdtemp(prefix="coatnet-bench-data-")
    torch.set_num_threads(1)
    try:
        feed = _feed(settings, Path(folder))
        cases = _cases(feed, settings, recipe)
        for case in cases.values():
            case()  # the page cache, one-time initialisation
        count = len(feed.pictures)
        samples = bench.alternate({name: partial(_rate, case, count) for name, case in cases.items()}, settings.rounds)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder)
    size = statistics.mean(map(len, feed.pictures))
    words = [settings.recipe, *settings.against]
    return bench.Record(
        name="-".join(["data", *(word for word in words if word)]),
        command=settings.command,
        facts=environment.facts("cpu"),
        config=asdict(settings) | {"samples": count, "mean bytes": size},
        unit="samples per second of one core's time",
        samples=samples,
        summary=_summary(samples, settings, size, recipe),
    )


def made_up(folder: Path, pictures: int) -> Dataset:
    """A data set of JPEGs in `folder`: noise of all sizes, the finest the faintest, as in photographs; about 58 KB."""
    made = [Picture(f"made-up/{n:05d}", "jpg", (n % 10,), str(n), partial(_jpeg, n)) for n in range(pictures)]
    vocabulary = [f"class {number}" for number in range(10)]
    return write_dataset(made, folder, vocabulary, "single", {"source": "made up"}, MADE_UP // 4)


def _jpeg(number: int) -> bytes:
    """A picture of the made-up data set."""
    draws, size = np.random.default_rng(number), (500, 400)
    pixels = np.full((size[1], size[0], 3), 127.5)
    for octave in range(7):
        noise = draws.integers(0, 256, (3 * 2**octave, 4 * 2**octave, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer) - 127.5) * 0.69**octave
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _feed(settings: Settings, folder: Path) -> Feed:
    """The data set and the samples that every case works through.

    Raises:
        InputError: see `measure`.
    """
    dataset = (
        open_dataset(settings.path) if settings.path else made_up(folder / "set", settings.pictures * 5 // 4 + BATCH)
    )
    split = dataset.split("train")
    count = min(settings.pictures, split.samples) // BATCH * BATCH
    if not count:
        least = min(settings.pictures, split.samples)
        raise InputError(f"{dataset.root}: {least} pictures to read: must be at least {BATCH}, a batch")
    shards = Fetched(split, Data(path=dataset.root)).open()
    places = [(shard, number) for shard, each in enumerate(split.counts.tolist()) for number in range(each)][:count]
    pictures = [shards.read(*place, dataset.classes).picture for place in places]
    return Feed(dataset, shards, tuple(places), tuple(pictures), settings.resolution, folder)


def _cases(feed: Feed, settings: Settings, recipe: Run | None) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each works through as many samples as `feed` has."""
    run = Run(
        model=Model(resolution=settings.resolution),
        data=Data(path=feed.dataset.root, global_batch=BATCH, workers=0),
        cluster=Cluster(device="cpu"),
    )
    classes, pixels = feed.dataset.classes, run.data.max_pixels
    cases: dict[str, Callable[[], object]] = {
        "read": lambda: [feed.shards.read(*place, classes) for place in feed.places],
        "decode": lambda: [decode(picture, pixels) for picture in feed.pictures],
        "pipeline": partial(_drain, feed, run),
    }
    if recipe is not None:
        model = replace(run.model, resolution=recipe.model.resolution)
        cases[f"pipeline of {settings.recipe}"] = partial(
            _drain, feed, replace(run, model=model, augment=recipe.augment)
        )
    if all(picture.startswith(b"\xff\xd8") for picture in feed.pictures):
        cases[LIMIT] = partial(decode_and_crop, feed)
    elif settings.against:
        raise InputError(f"--against {settings.against[0]}: {feed.dataset.root} has others than JPEGs; leave it out")
    return cases | {name: OTHERS[name](feed) for name in settings.against}


def _drain(feed: Feed, run: Run) -> None:
    """Read as many samples as `feed` has in a training run's order, as whole batches, in this process."""
    order = Order(feed.dataset.split("train").counts, run.seed, BATCH, run.data.lanes, run.data.piece)
    for _ in train_loader(feed.dataset, run, order, [(0, BATCH)], 0, len(feed.pictures) // BATCH):
        continue


def _rate(case: Callable[[], object], count: int) -> float:
    """Samples per second of CPU time, Python's collector of cycles kept out."""
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        case()
        return count / (time.process_time() - began)
    finally:
        gc.enable()


def _summary(samples: Mapping[str, list[float]], settings: Settings, size: float, recipe: Run | None) -> dict[str, str]:
    """What a reader wants: each rate, ours over the others', and what a recipe needs."""
    found = {name: f"{statistics.median(rates):,.0f} samples/s" for name, rates in samples.items()}
    found["pictures"] = f"{size / 1000:.1f} KB each, crops of {settings.resolution} px"
    for name in (LIMIT, *settings.against):
        if name in samples:
            rounds = [a / b for a, b in zip(samples["pipeline"], samples[name], strict=True)]
            ratio = bench.median_ratio(samples["pipeline"], samples[name])
            found[f"pipeline over {name}"] = f"{ratio:.2f}x ({min(rounds):.2f} to {max(rounds):.2f})"
    if recipe is not None:
        found[f"verdict for {settings.recipe}"] = _verdict(samples[f"pipeline of {settings.recipe}"], recipe)
    return found


def _verdict(rates: list[float], recipe: Run) -> str:
    """How many cores of this machine feed a node of GPUs that train `recipe`."""
    counts = cost.count(spec.of(recipe.model), recipe.model.resolution)
    peak = devices.peak_of(DEVICE)
    assert peak is not None
    needed = GPUS * MFU * peak / (6 * counts.multiply_adds)
    return (
        f"{needed / statistics.median(rates):.1f} cores like this one feed {GPUS} x {DEVICE} with {needed:,.0f} "
        f"images/s of {recipe.model.name} at {recipe.model.resolution} px (an estimate: 6 FLOP per multiply-add at "
        f"{MFU:.0%} of the peak)"
    )
