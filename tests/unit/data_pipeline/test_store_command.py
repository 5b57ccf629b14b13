"""Shards that a user's command fetches (`data.pipe`), and stores whose package is not installed."""

import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.schema import Data
from data_pipeline.cache import Cache
from data_pipeline.errors import DataError, StoreError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.prefetch import Fetched
from data_pipeline.shard import OpenShards, Sample, sidecar_path
from data_pipeline.store import Patience

PATIENCE = Patience(retries=0, wait=0.002, timeout=0.4)


@pytest.fixture
def store(dataset: Dataset) -> Path:
    return Path(dataset.root)


def first_shard(shards: OpenShards, count: int) -> list[Sample]:
    return [shards.read(0, number, 3) for number in range(count)]


def truth(store: Path) -> list[Sample]:
    return through(Data(path=str(store)))


@pytest.fixture
def command(store: Path, tmp_path: Path) -> Callable[..., Data]:
    """Data that a command fetches: a program that copies from the folder, with what it is to do besides."""

    def build(body: str = "", offset: bool = False, retries: int = 0) -> Data:
        program = f"""
            import os, sys, time, pathlib
            url, offset = sys.argv[1], int((sys.argv[2:] or ["0"])[0])
            content = pathlib.Path({str(store.parent)!r}, url.removeprefix("far://away/"))
            log = open({str(tmp_path / "log")!r}, "a")
            print(url, offset, file=log, flush=True)
            {body or "pass"}
            sys.stdout.buffer.write(content.read_bytes()[offset:])
        """
        (tmp_path / "fetch.py").write_text(textwrap.dedent(program))
        pipe = f"{sys.executable} {tmp_path / 'fetch.py'} {{url}}" + (" {offset}" if offset else "")
        return Data(path="far://away/set", pipe=pipe, cache=str(tmp_path / "cache"), fetch_retries=retries)

    return build


def through(data: Data) -> list[Sample]:
    split = open_dataset(data.path, data).split("train")
    return first_shard(Fetched(split, data).open(), int(split.counts[0]))


def test_a_command_fetches_from_elsewhere(command: Callable[..., Data], store: Path) -> None:
    assert through(command()) == truth(store)


@pytest.mark.parametrize("offset", [True, False])
def test_a_command_that_breaks_off_is_run_again(
    offset: bool, command: Callable[..., Data], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 'if url.endswith("0.tar") and not offset and not os.path.exists(url[-5:]): '
    half += 'open(url[-5:], "w"); sys.stdout.buffer.write(content.read_bytes()[:9000]); sys.exit(9)'
    monkeypatch.chdir(tmp_path)
    assert through(command(half, offset, retries=1)) == truth(store)
    asked = [line for line in (tmp_path / "log").read_text().splitlines() if "0.tar" in line]
    assert (
        asked
        == ["far://away/set/train/shard-000000.tar 0"] * (2 - offset)
        + ["far://away/set/train/shard-000000.tar 9000"] * offset
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('sys.exit("no such bucket")', "data.pipe ended with status 1: no such bucket"),
        ('sys.stdout.write("x" * 99); sys.exit(0)', r"manifest.json: damaged, not JSON"),
    ],
)
def test_a_command_that_fails_says_why(body: str, said: str, command: Callable[..., Data]) -> None:
    with pytest.raises(DataError, match=said):
        through(command(body))


def test_a_command_that_hangs_is_ended(
    command: Callable[..., Data], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = command('open("pid", "w").write(str(os.getpid())); time.sleep(600)')
    monkeypatch.chdir(tmp_path)
    split = open_dataset(store).split("train")
    patience = replace(PATIENCE, pipe=data.pipe)
    path, row = "far://away/set/train/shard-000000.tar", split.rows[0]
    with pytest.raises(StoreError, match=r"data\.pipe wrote nothing for 0\.4 s"):
        Cache(str(tmp_path / "cache"), 10**9, patience).shard(
            path, sidecar_path(path), row.samples, row.bytes, row.sha256
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_name_from_a_manifest_is_no_part_of_a_command(tmp_path: Path) -> None:
    patience = replace(PATIENCE, pipe="sh -c 'cat {url}'")
    for name in ("a;touch x", "$(touch x)", "a b", "a\nb", "`x`", "a'b", "{offset}"):
        with pytest.raises(DataError, match="a command gets only names of"):
            Cache(str(tmp_path), 10**9, patience).shard(f"far://away/{name}.tar", f"far://{name}.idx", 6, 99, "0" * 64)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gs")])
def test_a_missing_package_names_its_extra(scheme: str, extra: str, tmp_path: Path) -> None:
    if importlib.util.find_spec({"s3": "s3fs", "gs": "gcsfs"}[scheme]):
        pytest.skip("its package is installed")
    with pytest.raises(InputError, match=rf"pip install -e '\.\[{extra}\]'"):
        open_dataset(f"{scheme}://bucket/set", Data(cache=str(tmp_path)))
