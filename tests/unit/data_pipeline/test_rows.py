"""The rows of a split: whole columns say what row by row would, and 300,000 shards open in a moment."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import rows as rows_module
from data_pipeline.building.build import write_manifest
from data_pipeline.errors import DataError
from data_pipeline.rows import Joined, Row, Rows, ShardPaths, check_rows, fingerprint, inside, pack_rows, read_rows

GOOD = "0123456789abcdef" * 4


def columns(rows: list[Row]) -> Rows:
    return read_rows(pack_rows(rows), "index")


def row_by_row(kind: str, vocabulary: list[str], rows: list[Row]) -> str:
    """The fingerprint as version 1 of the manifest defines it."""
    digest = hashlib.sha256(json.dumps([kind, vocabulary]).encode())
    for row in rows:
        digest.update(json.dumps([row.path, row.samples, row.bytes, row.sha256]).encode() + b"\n")
    return digest.hexdigest()


def slow_check(rows: list[Row]) -> str:
    """The rules on rows, one row after the other: what is wrong, or nothing."""
    seen = set()
    for row in rows:
        try:
            path = inside("root", row.path, ".tar", "index")
        except DataError:
            return "path"
        if not (0 < row.samples < 2**48 and 0 < row.bytes < 2**48):
            return "positive"
        if len(row.sha256) != 64 or set(row.sha256) - set("0123456789abcdef"):
            return "positive"
        seen.add(path)
    return "" if len(seen) == len(rows) else "twice"


text = st.text(st.characters(codec="utf-8"), max_size=6)
names = st.one_of(
    st.sampled_from(["a.tar", "./a.tar", "b//c.tar", "..tar", ".tar", "/a.tar", "../a.tar", "b/../a.tar", "b/..", "a"]),
    text.map(lambda stem: stem + ".tar"),
    st.integers(0, 99).map(lambda number: f"train/shard-{number:06d}.tar"),
)
numbers = st.one_of(st.integers(1, 2**48 - 1), st.sampled_from([0, -1, 2**48, 2**62]))
hashes = st.one_of(st.just(GOOD), st.sampled_from(["", GOOD[1:], GOOD.upper(), GOOD + "\n", 'x"' * 32]))
any_row = st.builds(Row, path=names, samples=numbers, bytes=numbers, sha256=hashes)
good_row = st.builds(Row, path=names, samples=st.integers(1, 9), bytes=st.integers(1, 2**48 - 1), sha256=st.just(GOOD))


@given(rows=st.lists(st.one_of(any_row, good_row), max_size=8))
@settings(max_examples=300, deadline=None)
def test_columns_fingerprint_and_refuse_as_rows_would(rows: list[Row]) -> None:
    found = columns(rows)
    assert list(found) == rows
    assert [found[number] for number in range(len(rows))] == rows
    assert fingerprint("multi", ["a", "\u00e9"], found) == row_by_row("multi", ["a", "\u00e9"], rows)
    assert fingerprint("multi", ["a", "\u00e9"], rows) == row_by_row("multi", ["a", "\u00e9"], rows)
    wrong = slow_check(rows)
    assert not (found.are_plain() and wrong)
    if not wrong:
        check_rows(found, "root", "index")
        return
    with pytest.raises(DataError, match=wrong):
        check_rows(found, "root", "index")


@pytest.mark.parametrize("chunk", [1, 3, 1 << 14])
def test_rows_in_several_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(f"train/{n}.tar" if n != 5 else 'say "5".tar', n + 1, n + 2, GOOD) for n in range(10)]
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    found = columns(rows)
    assert list(found) == rows
    assert fingerprint("single", ["a"], found) == row_by_row("single", ["a"], rows)
    assert found.counts().tolist() == list(range(1, 11))
    assert found[2:4] == tuple(rows[2:4])
    assert found[-1] == rows[-1]
    with pytest.raises(IndexError):
        found[10]
    assert list(copy.deepcopy(found)) == rows  # as it travels to loader processes


def test_plain_rows_in_any_order_take_the_fast_way() -> None:
    rows = [Row(f"{n}.tar", 1, 1, GOOD) for n in (3, 1, 2)]
    assert columns(rows).are_plain()
    assert not columns([*rows, rows[0]]).are_plain()
    assert not columns([Row("./1.tar", 1, 1, GOOD)]).are_plain()


@pytest.mark.parametrize("root", ["folder", "http://host/a set"])
def test_paths_are_joined_when_asked_for(root: str) -> None:
    rows = [Row("train/a b.tar", 1, 1, GOOD), Row("./c//d.tar", 1, 1, GOOD)]
    paths = ShardPaths(root, columns(rows))
    assert list(paths) == [paths[0], paths[1]] == [inside(root, row.path, ".tar", "") for row in rows]
    assert paths[0].endswith("a%20b.tar" if "://" in root else "a b.tar")
    assert paths[1:] == (paths[1],)


@given(parts=st.lists(st.lists(st.integers(), max_size=4), max_size=5))
@settings(max_examples=50, deadline=None)
def test_joined_is_one_sequence(parts: list[list[int]]) -> None:
    whole, joined = [number for part in parts for number in part], Joined(parts)
    assert len(joined) == len(whole)
    assert list(joined) == whole == [joined[n] for n in range(len(whole))]
    assert [joined[n] for n in range(-len(whole), 0)] == whole
    assert joined[1:3] == tuple(whole[1:3])
    with pytest.raises(IndexError):
        joined[len(whole)]


OPEN = """
import sys, time
import numpy as np
from configs.schema import Data, Run
from data_pipeline import mixture
from data_pipeline.synthetic import open_data

def memory(name):  # ru_maxrss would hold the parent's peak
    return int(open("/proc/self/status").read().partition(name + ":")[2].split()[0]) * 1024

run = Run(data=Data(path=sys.argv[1], global_batch=4096))
before, began = memory("VmRSS"), time.process_time()
split = open_data(run).split("train")
order = mixture.begin(run, split)
for start in (0, 2_999_999_000, 30_000_000_000_123):
    positions = start + np.arange(4096)
    epoch, shard, sample = order.lookup(positions)
    assert (epoch == positions // 3_000_000_000).all()
    assert len(set(zip(shard.tolist(), sample.tolist()))) == 4096
    assert (order.find(epoch, shard, sample) == positions).all()
    assert split.shard_paths[int(shard[7])].endswith(f"train/shard-{shard[7]:06d}.tar")
print(time.process_time() - began, memory("VmHWM") - before)
"""


def test_300_thousand_shards_open_in_a_second_and_200_megabytes(tmp_path: Path) -> None:
    rows = [
        Row(f"train/shard-{n:06d}.tar", 10_000, 600_000_000 + n, hashlib.sha256(b"%d" % n).hexdigest())
        for n in range(300_000)
    ]
    write_manifest(tmp_path, {"train": rows}, "multi", ["a", "b"], [1, 2], {})
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert not done.returncode, done.stderr
    seconds, grown = map(float, done.stdout.split())
    assert seconds < 3.0  # of processor time; 0.7 to 0.8 where it was measured, and CI's machines are others
    assert grown < 200e6
