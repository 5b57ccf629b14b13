"""The cache on a folder as its store: left-overs, damage, eviction, locks, errors. Bad networks: tests/faults."""

import fcntl
import hashlib
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Data
from data_pipeline import cache as cache_module
from data_pipeline import manifest, prefetch
from data_pipeline.cache import Cache, cache_of
from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import Dataset, Split, open_dataset
from data_pipeline.order import Order
from data_pipeline.prefetch import Ahead, Fetched
from data_pipeline.shard import Sample, sidecar_path
from data_pipeline.store import Patience

HASTY = Patience(retries=1, wait=0.001, timeout=1)


def everything(split: Split, data: Data, classes: int = 3) -> list[Sample]:
    """Every sample of a split, through the cache that `data` says."""
    shards = Fetched(split, data).open()
    return [
        shards.read(shard, number, classes)
        for shard, count in enumerate(split.counts.tolist())
        for number in range(count)
    ]


def shard_of(cache: Cache, split: Split, number: int) -> str:
    """The path of a shard's copy."""
    path, row = split.shard_paths[number], split.rows[number]
    return cache.shard(path, sidecar_path(path), row.samples, row.bytes, row.sha256)


def on_disk(folder: Path) -> int:
    """Bytes of the copies."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".lock")


@pytest.fixture
def split(dataset: Dataset) -> Split:
    return dataset.split("train")


def test_copies_are_those_of_the_store_and_read_again_without_it(
    dataset: Dataset, split: Split, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(dataset.root, tmp_path / "store"))
    moved = open_dataset(root).split("train")
    data = Data(path=str(root), cache=str(tmp_path / "cache"))
    truth = everything(split, Data(path=dataset.root))
    assert everything(moved, data) == truth
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {row.sha256 + end for row in split.rows for end in (".tar", ".idx")} | {"room.lock"}
    shutil.rmtree(root)
    assert everything(moved, data) == truth


def test_folders_are_read_in_place_unless_a_cache_is_named(split: Split, tmp_path: Path) -> None:
    assert Fetched(split, Data()).path(1) == split.shard_paths[1]
    assert Fetched(split, Data(cache=str(tmp_path))).path(1) == str(tmp_path / f"{split.rows[1].sha256}.tar")
    found = cache_of(Data(), "s3://bucket/set")
    assert found is not None
    assert found.folder.endswith(f"coatnet-cache-{os.getuid()}")


@pytest.mark.parametrize("left", [b"", b"right", b"garbage", b"whole", b"longer"])
def test_left_overs_of_a_killed_run_are_continued_or_replaced(split: Split, tmp_path: Path, left: bytes) -> None:
    truth, row = Path(split.shard_paths[2]).read_bytes(), split.rows[2]
    content = {
        b"": b"",
        b"right": truth[:1000],
        b"garbage": b"x" * 1000,
        b"whole": truth,
        b"longer": truth + b"x",
    }[left]
    (tmp_path / f"{row.sha256}-{row.bytes}.part").write_bytes(content)
    (tmp_path / f"{row.sha256}.new").write_bytes(b"half a sidecar")
    path = shard_of(Cache(str(tmp_path), 10**9, Patience(retries=0, wait=0)), split, 2)
    assert Path(path).read_bytes() == truth
    assert Path(sidecar_path(path)).read_bytes() == Path(sidecar_path(split.shard_paths[2])).read_bytes()
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("ending", [".tar", ".idx"])
@pytest.mark.parametrize("change", ["cut", "flip", "gone"])
def test_a_copy_that_went_bad_is_fetched_again(split: Split, tmp_path: Path, ending: str, change: str) -> None:
    data, truth = Data(cache=str(tmp_path)), everything(split, Data())
    everything(split, data)
    for row in split.rows:
        file = tmp_path / f"{row.sha256}{ending}"
        if change == "cut":
            os.truncate(file, file.stat().st_size * 2 // 3)
        elif change == "gone":
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            content[len(content) // 3] ^= 1
            file.write_bytes(content)
    assert everything(split, data) == truth


def test_damage_in_the_store_itself_stays_an_error(dataset: Dataset, tmp_path: Path) -> None:
    root = Path(shutil.copytree(dataset.root, tmp_path / "store"))
    part = open_dataset(root).split("train")
    content = bytearray(Path(part.shard_paths[0]).read_bytes())
    content[700] ^= 1
    Path(part.shard_paths[0]).write_bytes(content)
    with pytest.raises(
        StoreError, match=r"shard-000000\.tar: cannot be fetched: .* do not match the manifest's sha256"
    ):
        shard_of(Cache(str(tmp_path / "cache"), 10**9, HASTY), part, 0)
    Path(part.shard_paths[1]).unlink()
    with pytest.raises(StoreError, match=r"shard-000001\.tar: cannot be fetched: no such file \(2 attempts"):
        shard_of(Cache(str(tmp_path / "cache"), 10**9, HASTY), part, 1)
    os.truncate(part.shard_paths[2], 1024)
    with pytest.raises(StoreError, match=r"ended after 1024 bytes .* 1024 of \d+ bytes here"):
        shard_of(Cache(str(tmp_path / "cache"), 10**9, HASTY), part, 2)
    Path(sidecar_path(part.shard_paths[3])).write_bytes(
        b"x" * len(Path(sidecar_path(part.shard_paths[3])).read_bytes())
    )
    with pytest.raises(StoreError, match=r"shard-000003\.idx: cannot be fetched: .* checksum"):
        shard_of(Cache(str(tmp_path / "cache"), 10**9, HASTY), part, 3)


def test_no_checksum_leads_out_of_the_folder(split: Split, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), 10**9, HASTY)
    for name in ("../" * 20 + "abcd", "A" * 64, "0" * 63, "0" * 64 + "\n"):
        with pytest.raises(DataError, match="64 hex digits"):
            cache.shard(split.shard_paths[0], sidecar_path(split.shard_paths[0]), 6, 100, name)


def test_the_longest_unused_goes_first_and_nothing_in_use_or_foreign(split: Split, tmp_path: Path) -> None:
    size = max(row.bytes for row in split.rows) + 1000
    (tmp_path / "notes.txt").write_bytes(b"x" * 10 * size)
    data = Data(cache=str(tmp_path), cache_bytes=3 * size)
    fetched = Fetched(split, data)
    open_shards = fetched.open()
    open_shards.get(0)
    for number in (1, 2, 1, 3, 4):
        fetched.path(number)
    here = {n for n, row in enumerate(split.rows) if (tmp_path / f"{row.sha256}.tar").exists()}
    assert here == {0, 3, 4}
    assert (tmp_path / "notes.txt").exists()
    open_shards.close()
    fetched.path(5)
    assert not (tmp_path / f"{split.rows[0].sha256}.tar").exists()


def test_an_evicted_shard_that_is_open_is_still_read(split: Split, tmp_path: Path) -> None:
    shards = Fetched(split, Data(cache=str(tmp_path))).open()
    first = shards.read(0, 0, 3)
    for path in tmp_path.glob(f"{split.rows[0].sha256}*"):
        path.unlink()
    assert shards.read(0, 0, 3) == first


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["open", "fetch", "close", "litter"]), st.integers(0, 8)), min_size=5, max_size=25
    ),
    room=st.floats(0.5, 5),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bound_holds(
    split: Split, tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]], room: float
) -> None:
    """Whatever is fetched, opened, closed and left behind: bytes on disk <= limit, or what is in use and the last."""
    folder = tmp_path_factory.mktemp("cache")
    biggest = max(row.bytes for row in split.rows) + 200
    limit = int(room * biggest)
    cache = Cache(str(folder), limit, HASTY)
    in_use: dict[int, int] = {}
    for move, number in moves:
        number %= len(split.rows)
        row = split.rows[number]
        if move == "close":
            if number in in_use:
                os.close(in_use.pop(number))
            continue
        if move == "litter":
            (folder / f"{hashlib.sha256(b'%d' % number).hexdigest()}-5.part").write_bytes(b"left")
            continue
        transfer = not (folder / f"{row.sha256}.tar").exists()
        path = shard_of(cache, split, number)
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == row.sha256
        if move == "open" and number not in in_use:
            in_use[number] = os.open(path, os.O_RDONLY)
            fcntl.flock(in_use[number], fcntl.LOCK_SH | fcntl.LOCK_NB)
        held = sum(split.rows[each].bytes + 200 for each in {*in_use, number})
        assert not transfer or on_disk(folder) <= max(limit, held)
    for descriptor in in_use.values():
        os.close(descriptor)


def test_a_cache_that_cannot_be_written_says_where(split: Split, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot be kept in the cache .*file.*choose another data\.cache"):
        Fetched(split, Data(cache=str(tmp_path / "file"))).path(0)
    # A disk that is full, as near as a test gets to it.
    code = f"""
        import resource, signal
        from configs.schema import Data
        from data_pipeline.manifest import open_dataset
        from data_pipeline.prefetch import Fetched
        split = open_dataset({split.root!r}).split("train")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        Fetched(split, Data(cache={str(tmp_path / "small")!r})).path(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "StoreError" in done.stderr
    assert "smaller data.cache_bytes" in done.stderr
    assert Path(Fetched(split, Data(cache=str(tmp_path / "small"))).path(0)).stat().st_size == split.rows[0].bytes


def test_a_holder_that_is_stuck_is_given_up(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "STALLED", 0.3)
    row = split.rows[0]
    with open(tmp_path / f"{row.sha256}-{row.bytes}.part", "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"a process that fetches it into .* has not got on"):
            shard_of(Cache(str(tmp_path), 10**9, HASTY), split, 0)
    assert shard_of(Cache(str(tmp_path), 10**9, HASTY), split, 0)  # its lock went with it


def test_who_waits_for_a_transfer_does_not_wait_for_its_readers(split: Split, tmp_path: Path) -> None:
    row, cache = split.rows[0], Cache(str(tmp_path), 10**9, HASTY)
    with open(tmp_path / f"{row.sha256}-{row.bytes}.part", "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        found: list[str] = []
        waiting = threading.Thread(target=lambda: found.append(shard_of(cache, split, 0)), daemon=True)
        waiting.start()
        time.sleep(0.2)
        assert not found
        part.write(Path(split.shard_paths[0]).read_bytes())
        part.flush()
        shutil.copy(sidecar_path(split.shard_paths[0]), tmp_path / f"{row.sha256}.idx")
        os.rename(part.name, tmp_path / f"{row.sha256}.tar")
        fcntl.flock(part, fcntl.LOCK_SH)  # as a reader that keeps it open
        waiting.join(10)
        assert found == [str(tmp_path / f"{row.sha256}.tar")]


def test_a_large_folder_is_looked_through_when_it_is_read(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(dataset.root, tmp_path / "store"))
    for module in (manifest, prefetch):
        monkeypatch.setattr(module, "CHECKED_AT_ONCE", 3)
    (root / "train" / "shard-000001.tar").unlink()
    os.truncate(root / "train" / "shard-000002.idx", 50)
    part = open_dataset(root).split("train")
    shards = Fetched(part, Data()).open()
    assert shards.read(0, 0, 3).picture
    with pytest.raises(StoreError, match=r"shard-000001\.tar: missing or unreadable"):
        shards.read(1, 0, 3)
    with pytest.raises(StoreError, match=r"shard-000002\.idx: 50 bytes, the manifest says"):
        shards.read(2, 0, 3)


def test_what_comes_next_is_fetched_within_the_share(split: Split, tmp_path: Path) -> None:
    counts = split.counts
    order = Order(counts, 3, 4, 2, 4)
    share = 3 * max(row.bytes for row in split.rows)
    data = Data(cache=str(tmp_path), cache_bytes=2 * share, workers=0)
    fetched = Fetched(split, data)
    assert fetched.share == share
    ahead = Ahead(fetched, order, batch=4)
    positions = np.arange(4)
    ahead.after(positions, order.lookup(positions)[1])
    needed = list(dict.fromkeys(order.lookup(np.arange(4, split.samples))[1].tolist()))
    wanted = {n for n, row in enumerate(split.rows) if (tmp_path / f"{row.sha256}.tar").exists()}
    deadline = 200
    while len(wanted) < 3 and deadline:
        deadline -= 1
        time.sleep(0.02)
        wanted = {n for n, row in enumerate(split.rows) if (tmp_path / f"{row.sha256}.tar").exists()}
    assert 3 <= len(wanted) <= 4  # the last shard is smaller
    assert wanted <= set(needed[:5])
    quiet = Ahead(Fetched(split, Data()), order, batch=4)  # read in place: nothing to do
    quiet.after(positions, order.lookup(positions)[1])
    assert quiet._thread is None


def test_two_processes_read_at_random_in_a_cache_that_is_too_small(split: Split, tmp_path: Path) -> None:
    code = f"""
        import random, sys
        from configs.schema import Data
        from data_pipeline.manifest import open_dataset
        from data_pipeline.prefetch import Fetched
        split = open_dataset({split.root!r}).split("train")
        read = lambda shards, n: [shards.read(n, i, 3) for i in range(int(split.counts[n]))]
        copies = Fetched(split, Data(cache={str(tmp_path)!r}, cache_bytes=50_000)).open()
        copies._limit = 1
        stored, draw = Fetched(split, Data()).open(), random.Random(int(sys.argv[1]))
        for _ in range(150):
            n = draw.randrange(len(split.counts))
            assert read(copies, n) == read(stored, n)
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    running = [subprocess.Popen([*program, str(seed)], stderr=subprocess.PIPE, text=True) for seed in range(2)]
    for process in running:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    largest = max(row.bytes for row in split.rows) + 200
    assert on_disk(tmp_path) <= max(50_000, 2 * largest)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for pipe in ("curl", "curl {url} {of}", "curl '{url}", "{url}", "a {url} {0}"):
        with pytest.raises(InputError, match=r"data\.pipe"):
            Data(path="s3://bucket/set", pipe=pipe)
    with pytest.raises(InputError, match=r"data\.pipe .* data\.path is none"):
        Data(path=str(tmp_path), pipe="curl {url}")
    for url in ("ftp://host/set", "s3://", "http://host/set?key=1", "http://me:secret@host/set", "file:///etc"):
        with pytest.raises(InputError, match=r"data\.path"):
            open_dataset(url)


def test_draws_of_the_run_are_left_alone(tmp_path: Path) -> None:
    before = random.getstate()
    with pytest.raises(StoreError, match="2 attempts"):
        Cache(str(tmp_path), 1, HASTY).shard(str(tmp_path / "none.tar"), str(tmp_path / "none.idx"), 6, 100, "0" * 64)
    assert random.getstate() == before
