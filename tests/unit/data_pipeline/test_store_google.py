"""Shards in Google Cloud Storage, against a small server of its protocol. Needs `pip install -e '.[gs]'`."""

import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from configs.schema import Data
from data_pipeline.cache import Cache
from data_pipeline.errors import StoreError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.prefetch import Fetched
from data_pipeline.shard import OpenShards, Sample, sidecar_path
from data_pipeline.store import Patience

pytest.importorskip("gcsfs")

SILENCE = 60.0  # seconds


class _Storage(ThreadingHTTPServer):
    """A bucket of the files in `root`: what they are, and their bytes, in ranges. Falls silent if it is told to."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.silent = root, 0  # answers that break off in the middle
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: _Storage

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """An object's description or, with `alt`, its bytes."""
        parts = urllib.parse.urlsplit(self.path)
        file = self.server.root / urllib.parse.unquote(parts.path.partition("/o/")[2])
        if not file.is_file():
            self._answer(404, b"{}")
        elif "alt" not in urllib.parse.parse_qs(parts.query):
            facts = {"name": file.name, "bucket": "pictures", "size": str(file.stat().st_size)}
            self._answer(200, json.dumps(facts).encode())
        else:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self._answer(206, file.read_bytes()[int(first) : int(last) + 1])

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-1])
        self.wfile.flush()
        if status == 206 and self.server.silent:
            self.server.silent -= 1
            time.sleep(SILENCE)
        self.wfile.write(body[-1:])


@pytest.fixture
def storage(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Storage]:
    """A bucket `pictures` that holds the data set."""
    server = _Storage(Path(dataset.root).parent)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()


def samples(shards: OpenShards, counts: list[int]) -> list[Sample]:
    return [shards.read(shard, number, 3) for shard, count in enumerate(counts) for number in range(count)]


@pytest.mark.usefixtures("storage")
def test_a_set_in_google_storage_is_read_as_from_the_folder(dataset: Dataset, tmp_path: Path) -> None:
    data = Data(path=f"gs://pictures/{Path(dataset.root).name}", cache=str(tmp_path))
    there, here = open_dataset(data.path, data).split("train"), dataset.split("train")
    counts = here.counts.tolist()
    assert samples(Fetched(there, data).open(), counts) == samples(Fetched(here, Data()).open(), counts)
    with pytest.raises(StoreError, match=r"gs://pictures/none/manifest\.json: cannot be fetched: .*1 attempts"):
        open_dataset("gs://pictures/none", data)


def test_a_silent_store_is_asked_again(storage: _Storage, dataset: Dataset, tmp_path: Path) -> None:
    row = dataset.split("train").rows[0]
    url = f"gs://pictures/{Path(dataset.root).name}/{row.path}"
    storage.silent, begun = 1, time.monotonic()
    cache = Cache(str(tmp_path), 10**9, Patience(retries=2, timeout=0.5, wait=0.01))
    copy = cache.shard(url, sidecar_path(url), row.samples, row.bytes, row.sha256)
    assert Path(copy).read_bytes() == Path(dataset.root, row.path).read_bytes()
    assert time.monotonic() - begun < SILENCE / 2
