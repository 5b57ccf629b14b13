"""Kill x resume: loaders killed with SIGKILL at any sample, resumed at other worlds and workers, lose nothing.

Real processes read through real loader processes. The cursor is what a checkpoint would hold, counted where all ranks
have finished a step; what was delivered after it is delivered again. The whole must be what one process alone reads:
the same samples at the same positions with the same pixels, each sample once per epoch.
"""

import io
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait

import pytest
from PIL import Image

from configs.schema import Augment, Cluster, Data, Model, Run
from data_pipeline import mixture
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.manifest import Dataset
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.stream import open_data, train_loader
from tests.faults.loader_rank import MICRO, Record, load, records

BATCH = 24
KILLS = int(os.environ.get("COATNET_KILLS", "48"))  # of the slow campaign

Layout = tuple[int, ...]  # loader processes of each rank; as many ranks


def pictures(name: str, count: int, classes: int, several: bool) -> list[Picture]:
    """Pictures of their own size and colour, in PNG and JPEG."""

    def encoded(number: int) -> bytes:
        file = io.BytesIO()
        gradient = Image.linear_gradient("L").resize((24 + number % 9, 20 + number % 7)).rotate(number)
        picture = Image.merge("RGB", [gradient.point(lambda v, k=k: (v * k + number) % 256) for k in (1, 2, 3)])
        picture.save(file, format="JPEG" if number % 2 else "PNG")
        return file.getvalue()

    found = []
    for number in range(count):
        labels = (number % classes,) if not several else tuple(k for k in range(classes) if number >> k & 1)
        key = f"{name}/{number:04d}"
        found.append(Picture(key, "jpg" if number % 2 else "png", labels, key, partial(encoded, number)))
    return found


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """100 pictures of single labels in shards of 7, and 45 of several labels in shards of 6."""
    folder = tmp_path_factory.mktemp("matrix")
    write_dataset(pictures("one", 100, 3, False), folder / "one", ["a", "b", "c"], "single", {}, 7)
    write_dataset(pictures("some", 45, 2, True), folder / "some", ["d", "b"], "multi", {}, 6)
    return str(folder / "one"), str(folder / "some")


def run_of(roots: tuple[str, str], mixed: bool) -> Run:
    """A run over the first data set, or over both, with every augmentation."""
    both = tuple(f"{root}:{weight}" for root, weight in zip(roots, (2, 1), strict=True))
    return Run(
        seed=11,
        model=Model(resolution=32),
        data=Data(path=roots[0], mixture=both if mixed else (), global_batch=BATCH, workers=0, lanes=6, piece=5),
        augment=Augment(randaugment_layers=2, randaugment_magnitude=15, mixup_alpha=0.8, cutmix_alpha=1.0),
        cluster=Cluster(device="cpu"),
    )


def alone(run: Run, dataset: Dataset, order: Order | Mixture, steps: int) -> list[Record]:
    """What one process reads that is never killed."""
    slices = [(first, first + MICRO) for first in range(0, BATCH, MICRO)]
    return [record for batch in train_loader(dataset, run, order, slices, 0, steps) for record in records(batch)]


class Life:
    """The ranks of one start of the run, from a cursor on until they are killed or have done their steps."""

    def __init__(self, run: Run, state: str, layout: Layout, steps: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_pipeline.stream"])
        self.ends: list[Connection] = []
        self.ranks = []
        self.steps = steps
        for rank, workers in enumerate(layout):
            here, there = context.Pipe()
            mine = replace(run, data=replace(run.data, workers=workers))
            self.ranks.append(context.Process(target=load, args=(mine, state, rank, len(layout), steps, there)))
            self.ranks[-1].start()
            there.close()
            self.ends.append(here)

    def read(self, samples: int) -> tuple[list[Record], int]:
        """What is delivered until `samples` have come, then killed: the records, and the steps all ranks finished."""
        each = BATCH // len(self.ranks)
        got: list[list[Record]] = [[] for _ in self.ranks]
        done = 0
        try:
            while done < self.steps and sum(map(len, got)) < samples:
                ready = wait(self.ends, timeout=120)
                assert ready, "no rank delivers"
                for end, found in zip(self.ends, got, strict=True):
                    if end in ready:
                        found += end.recv()
                if all(len(found) == (done + 1) * each for found in got):
                    done += 1
                    for end in self.ends if done < self.steps else ():
                        end.send("on")
        finally:
            self.kill()
        return [record for found in got for record in found], done

    def kill(self) -> None:
        """SIGKILL every rank, in random order."""
        for process in random.sample(self.ranks, len(self.ranks)):
            process.kill()
        for process in self.ranks:
            process.join()
        for end in self.ends:
            end.close()


def chain(run: Run, layouts: Sequence[Layout], seed: int, last: int) -> int:
    """Kill a life of each layout at a random sample, do `last` steps without loader processes, compare the whole.

    Returns:
        How many samples were compared.
    """
    draw, dataset = random.Random(seed), open_data(run)
    order = mixture.begin(run, dataset.split("train"))
    identity = dataset.split("train").fingerprint
    seen: dict[int, Record] = {}
    consumed = 0
    for number, layout in enumerate([*layouts, (0,)]):
        final = number == len(layouts)
        life = Life(run, json.dumps(order.state(consumed, identity)), layout, last if final else 1000)
        found, done = life.read(last * BATCH if final else draw.randint(1, 5 * BATCH))
        assert len({index for index, _, _ in found}) == len(found)
        seen = {index: record for index, record in seen.items() if index < consumed}  # later ones come again
        assert not seen.keys() & {index for index, _, _ in found}
        seen |= {record[0]: record for record in found}
        if final:
            assert done == last
        # A checkpoint holds the last finished step, or one before it.
        consumed += BATCH * (done if final or draw.random() < 0.7 else done // 2)
    assert sorted(seen) == list(range(consumed))
    assert [seen[index] for index in range(consumed)] == alone(run, dataset, order, consumed // BATCH)
    check_epochs(dataset, [seen[index][1] for index in range(consumed)])
    return consumed


def check_epochs(dataset: Dataset, keys: list[str]) -> None:
    """Every sample of every data set comes once in each whole epoch of its own."""
    sources = dataset.split("train").sources
    names = ("one", "some") if sources else ("one",)
    for name, samples in zip(names, [s.samples for s in sources] or [dataset.split("train").samples], strict=True):
        mine = [key for key in keys if key.startswith(name)]
        assert len(mine) >= samples, "the run is too short to show an epoch"
        for first in range(0, len(mine) - samples + 1, samples):
            assert len(set(mine[first : first + samples])) == samples


@pytest.mark.parametrize(
    ("mixed", "layouts"),
    [(False, [(1,), (0, 0, 0), (0, 1)]), (True, [(0, 0), (1, 0, 0), (0,)])],
    ids=["one", "mixture"],
)
def test_killed_loaders_resume_exactly(roots: tuple[str, str], mixed: bool, layouts: list[Layout]) -> None:
    chain(run_of(roots, mixed), layouts, seed=int(mixed), last=8)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixture"])
def test_killed_loaders_resume_exactly_in_every_layout(
    roots: tuple[str, str], mixed: bool, record_property: Callable[[str, object], None]
) -> None:
    draw = random.Random(mixed)
    every = [(workers,) * world for world in (1, 2, 3, 4) for workers in (0, 1, 3)]
    layouts: list[Layout] = []
    while len(layouts) < KILLS:  # each round kills every layout once, in another order
        layouts += draw.sample(every, len(every))
    chains = range(0, len(layouts), 12)
    samples = [chain(run_of(roots, mixed), layouts[first : first + 12], first + mixed, last=8) for first in chains]
    record_property("kills of all ranks and loaders", len(layouts))
    record_property("samples after them, in their places with their pixels", sum(samples))
