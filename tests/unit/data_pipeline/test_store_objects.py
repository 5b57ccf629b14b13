"""Shards in S3, against a server of its protocol on this machine. Needs `pip install -e '.[s3]' 'moto[server]'`."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Data
from data_pipeline.cache import Cache
from data_pipeline.errors import StoreError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.prefetch import Fetched
from data_pipeline.shard import OpenShards, Sample, sidecar_path
from data_pipeline.store import Patience

s3fs: Any = pytest.importorskip("s3fs")
moto: Any = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket(dataset: Dataset) -> Iterator[Any]:
    """A bucket `pictures` that holds the data set in `sets/small`; through s3fs."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as settings:
        settings.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        settings.setenv("AWS_ACCESS_KEY_ID", "testing")
        settings.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        store = s3fs.S3FileSystem()
        store.mkdir("pictures")
        store.put(dataset.root + "/", "pictures/sets/small/", recursive=True)
        yield store
    server.stop()


def samples(shards: OpenShards, counts: list[int]) -> list[Sample]:
    return [shards.read(shard, number, 3) for shard, count in enumerate(counts) for number in range(count)]


def test_a_set_in_s3_is_read_as_from_the_folder(bucket: Any, dataset: Dataset, tmp_path: Path) -> None:
    data = Data(path="s3://pictures/sets/small", cache=str(tmp_path))
    there, here = open_dataset(data.path, data).split("train"), dataset.split("train")
    counts = here.counts.tolist()
    assert samples(Fetched(there, data).open(), counts) == samples(Fetched(here, Data()).open(), counts)


def test_what_is_there_of_a_shard_is_not_fetched_again(bucket: Any, dataset: Dataset, tmp_path: Path) -> None:
    row, path = dataset.split("train").rows[0], "s3://pictures/sets/small/train/shard-000000.tar"
    truth = Path(dataset.root, row.path).read_bytes()
    part = tmp_path / f"{row.sha256}-{row.bytes}.part"
    part.write_bytes(truth[:-512])
    copy = Cache(str(tmp_path), 10**9, Patience(0)).shard(path, sidecar_path(path), row.samples, row.bytes, row.sha256)
    assert Path(copy).read_bytes() == truth


def test_a_missing_bucket_or_shard_is_named(bucket: Any, dataset: Dataset, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://none/set/manifest\.json: cannot be fetched: .*1 attempts"):
        open_dataset("s3://none/set", Data(cache=str(tmp_path)))
    assert time.monotonic() - begun < 10
    row, path = dataset.split("train").rows[1], "s3://pictures/sets/small/train/none.tar"
    with pytest.raises(StoreError, match=r"none\.idx: cannot be fetched: FileNotFoundError"):
        Cache(str(tmp_path), 10**9, Patience(0)).shard(path, sidecar_path(path), row.samples, row.bytes, row.sha256)


def test_a_thread_fetches_as_well(bucket: Any, dataset: Dataset, tmp_path: Path) -> None:
    data = Data(path="s3://pictures/sets/small", cache=str(tmp_path))
    fetched, found = Fetched(open_dataset(data.path, data).split("train"), data), []
    thread = threading.Thread(target=lambda: found.append(os.path.getsize(fetched.path(2))))
    thread.start()
    thread.join(30)
    assert found == [dataset.split("train").rows[2].bytes]
