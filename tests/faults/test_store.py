"""Data over a bad network: never a silent loss, never a hang, never a wrong sample; one transfer per node."""

import importlib.util
import io
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Augment, Cluster, Data, Evaluate, Model, Run
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.cache import Cache
from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import Split, open_dataset
from data_pipeline.order import Order
from data_pipeline.shard import OpenShards, Sample, sidecar_path
from data_pipeline.store import Patience
from data_pipeline.stream import train_loader

_spec = importlib.util.spec_from_file_location("store_server", Path(__file__).with_name("store_server.py"))
assert _spec is not None
assert _spec.loader is not None
store_server: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(store_server)

Property = Callable[[str, object], None]

RETRIES = 3
PATIENCE = Patience(retries=RETRIES, wait=0.002, timeout=0.4)
FAST_CASES, CASES = 32, int(os.environ.get("COATNET_STORE_CASES", "540"))


def encoded(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (48, 40 + number % 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 pictures in shards of 8, about 60 KB each."""
    root = tmp_path_factory.mktemp("store") / "a set"
    pictures = [Picture(f"p-{n}", "png", (n % 3,), str(n), partial(encoded, n)) for n in range(60)]
    write_dataset(pictures, root, ["a", "b", "c"], "single", {"source": "noise"}, 8)
    return root


@pytest.fixture
def server(store: Path) -> Iterator[Any]:
    """Serves the data set's parent folder."""
    serving = store_server.Server(store.parent)
    yield serving
    serving.close()


def url_of(server: Any) -> str:
    return f"{server.url}/a%20set"


def remote(server: Any, store: Path) -> Split:
    """The training split as it looks behind the server, opened without asking it."""
    split = open_dataset(store).split("train")
    return replace(split, shard_paths=tuple(f"{url_of(server)}/{row.path}" for row in split.rows))


def shards_of(split: Split, cache: Cache) -> OpenShards:
    """The split's shards through `cache`."""

    def copy(shard: int) -> tuple[str, str, int, int, str]:
        row, path = split.rows[shard], split.shard_paths[shard]
        return path, sidecar_path(path), row.samples, row.bytes, row.sha256

    return OpenShards(
        split.shard_paths, split.counts, 4, lambda n: cache.shard(*copy(n)), lambda n: cache.renew(*copy(n))
    )


def read(shards: OpenShards, split: Split, shard: int) -> list[Sample]:
    return [shards.read(shard, number, 3) for number in range(int(split.counts[shard]))]


def truth(store: Path, shard: int) -> list[Sample]:
    split = open_dataset(store).split("train")
    return read(OpenShards(split.shard_paths, split.counts), split, shard)


def one_case(seed: int, server: Any, store: Path, folder: Path) -> str:
    """Up to RETRIES faults drawn for the shard and its sidecar: all samples must come through in the end.

    With more faults than that the same, or a StoreError; afterwards, with a whole server, the samples again.
    """
    draw = random.Random(seed)
    split, shard = remote(server, store), draw.randrange(5)
    name = f"/a set/{split.rows[shard].path}"
    server.folder, server.draw, server.always = store.parent, random.Random(seed), ""
    few = draw.random() < 0.6
    for ending in (".tar", ".idx"):
        count = draw.randint(0, RETRIES) if few else draw.randint(RETRIES + 1, 2 * RETRIES + 4)
        server.plan[name.removesuffix(".tar") + ending] = [draw.choice(store_server.FAULTS) for _ in range(count)]
    cache = Cache(str(folder), 10**9, PATIENCE)
    begun, said = time.monotonic(), ""
    try:
        found = read(shards_of(split, cache), split, shard)
    except StoreError as error:
        said, found = str(error), truth(store, shard)
    assert found == truth(store, shard)
    assert not said or (not few and split.shard_paths[shard] in said.replace(".idx", ".tar"))
    assert time.monotonic() - begun < 30
    server.plan.clear()
    assert read(shards_of(split, cache), split, shard) == truth(store, shard)
    return "given up" if said else "read"


def campaign(seeds: range, server: Any, store: Path, tmp_path: Path) -> Counter[str]:
    outcomes = Counter(one_case(seed, server, store, tmp_path / str(seed)) for seed in seeds)
    assert outcomes["read"] > len(seeds) // 2
    assert outcomes["given up"]
    return outcomes


def test_faults_drawn_by_seed(server: Any, store: Path, tmp_path: Path) -> None:
    campaign(range(FAST_CASES), server, store, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_faults_drawn_by_seed(server: Any, store: Path, tmp_path: Path, record_property: Property) -> None:
    for outcome, cases in campaign(range(1000, 1000 + CASES), server, store, tmp_path).items():
        record_property(f"stores with faults, {outcome}", cases)


@pytest.mark.parametrize("fault", store_server.FAULTS)
def test_a_store_that_never_mends_is_given_up(fault: str, server: Any, store: Path, tmp_path: Path) -> None:
    server.always = fault
    split = remote(server, store)
    begun = time.monotonic()
    try:
        found = read(shards_of(split, Cache(str(tmp_path), 10**9, PATIENCE)), split, 0)
    except StoreError as error:
        assert re.search(r"shard-000000\.(tar|idx): cannot be fetched: .*\(\d+ attempts in", str(error), re.S)  # noqa: PT017
        assert fault not in ("lie long", "appended")
    else:
        # Each attempt brings some of the file, or brings it whole.
        assert fault in ("drop", "stall", "truncate", "lie long", "lie short", "appended")
        assert found == truth(store, 0)
    assert time.monotonic() - begun < 20
    assert max(server.asked.values()) <= 16 * (RETRIES + 1)


def test_a_dropped_transfer_goes_on_where_it_ended(server: Any, store: Path, tmp_path: Path) -> None:
    split = remote(server, store)
    name, size = f"/a set/{split.rows[0].path}", split.rows[0].bytes
    server.plan[name] = ["drop", "drop", "drop"]
    assert read(shards_of(split, Cache(str(tmp_path), 10**9, PATIENCE)), split, 0) == truth(store, 0)
    assert server.sent[name] <= size + 3 * 2**16  # of a reset connection, what was on the way is lost
    assert server.ranges == [name] * 3


PROGRAM = """
    import sys
    from configs.schema import Data
    from data_pipeline.manifest import open_dataset
    from data_pipeline.prefetch import Fetched
    url, folder, root = sys.argv[1:]
    data = Data(path=url, cache=folder)
    split, stored = open_dataset(url, data).split("train"), open_dataset(root).split("train")
    shards, truth = Fetched(split, data).open(), Fetched(stored, Data()).open()
    for shard in range(len(split.counts)):
        for number in range(int(split.counts[shard])):
            assert shards.read(shard, number, 3) == truth.read(shard, number, 3)
    print("whole")
"""


def reader(server: Any, folder: Path, store: Path) -> subprocess.Popen[str]:
    """A process that reads the whole split from the server and compares it with the folder."""
    words = [sys.executable, "-c", textwrap.dedent(PROGRAM), url_of(server), str(folder), str(store)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_one_transfer_serves_all_processes(server: Any, store: Path, tmp_path: Path) -> None:
    server.pace = 0.01
    processes = [reader(server, tmp_path, store) for _ in range(4)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["whole\n"] * 4
    split = open_dataset(store).split("train")
    for row in split.rows:
        assert server.asked[f"/a set/{row.path}"] == 1
        assert server.asked[f"/a set/{sidecar_path(row.path)}"] == 1
    assert server.asked["/a set/train.parquet"] == 1


def test_killed_readers_leave_nothing_in_the_way(server: Any, store: Path, tmp_path: Path) -> None:
    server.pace, draw = 0.02, random.Random(5)
    for _ in range(3):
        process = reader(server, tmp_path, store)
        deadline = time.monotonic() + 30
        seen = sum(server.sent.values())
        while sum(server.sent.values()) < seen + draw.randrange(20_000, 150_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        assert "Error" not in process.communicate()[0]
    assert list(tmp_path.glob("*.part"))
    server.pace = 0
    assert reader(server, tmp_path, store).communicate(timeout=120)[0] == "whole\n"
    assert not list(tmp_path.glob("*.part"))
    split = open_dataset(store).split("train")
    assert server.ranges  # what was there was not fetched again
    for path, sent in server.sent.items():
        size = (store.parent / path.lstrip("/")).stat().st_size
        assert path.endswith((".json", ".parquet")) or sent <= size + 5 * 2**17, path
    assert len(split.rows) > 5


def run_of(path: str, cache: Path, workers: int = 0, retries: int = 2) -> Run:
    return Run(
        seed=3,
        model=Model(resolution=32),
        data=Data(
            path=path, global_batch=6, workers=workers, lanes=3, piece=4, cache=str(cache), fetch_retries=retries
        ),
        augment=Augment(),
        evaluate=Evaluate(micro_batch=4),
        cluster=Cluster(device="cpu"),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(workers: int, server: Any, store: Path, tmp_path: Path) -> None:
    here, there = run_of(str(store), tmp_path / "unused"), run_of(url_of(server), tmp_path / "cache", workers)
    here = replace(here, data=replace(here.data, cache=""))
    server.plan["/a set/train/shard-000002.tar"] = ["drop", "503"]
    batches = []
    for run in (here, there):
        dataset = open_dataset(run.data.path, run.data)
        order = Order(dataset.split("train").counts, 3, 6, 3, 4)
        batches.append(list(train_loader(dataset, run, order, [(0, 6)], 0, 12)))
    for mine, theirs in zip(*batches, strict=True):
        assert mine.keys == theirs.keys
        assert torch.equal(mine.images_BCHW, theirs.images_BCHW)
        assert torch.equal(mine.labels, theirs.labels)


def test_a_missing_shard_stops_the_loader_with_its_name(server: Any, store: Path, tmp_path: Path) -> None:
    server.plan["/a set/train/shard-000001.tar"] = ["404"] * 50
    run = run_of(url_of(server), tmp_path, retries=0)
    dataset = open_dataset(run.data.path, run.data)
    order = Order(dataset.split("train").counts, 3, 6, 3, 4)
    with pytest.raises(StoreError, match=r"train/shard-000001\.tar: cannot be fetched: HTTP status 404"):
        list(train_loader(dataset, run, order, [(0, 6)], 0, 12))


def test_a_manifest_that_is_not_there_or_not_whole_is_said_at_once(server: Any, store: Path, tmp_path: Path) -> None:
    data, begun = Data(cache=str(tmp_path)), time.monotonic()
    with pytest.raises(StoreError, match=r"none/manifest\.json: cannot be fetched: HTTP status 404 .* \(1 attempts"):
        open_dataset(f"{server.url}/none", data)
    assert time.monotonic() - begun < 1
    for fault in ("garbage", "truncate"):
        server.plan["/a set/manifest.json"] = [fault]
        with pytest.raises(DataError, match=r"manifest\.json"):
            open_dataset(url_of(server), data)
    server.plan["/a set/train.parquet"] = ["flipped", "drop"]
    assert open_dataset(url_of(server), data).split("train").samples == open_dataset(store).split("train").samples
