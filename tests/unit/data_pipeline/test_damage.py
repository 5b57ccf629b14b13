"""Damaged samples: stopped at or replaced, never lost in silence; replaced alike at any number of ranks and workers."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Augment, Run
from data_pipeline import damage
from data_pipeline.batch import Batch
from data_pipeline.damage import FAR, NEAR, BadSamples, stand_ins
from data_pipeline.errors import Damage, DataError, StoreError
from data_pipeline.manifest import Dataset, Split, open_dataset
from data_pipeline.members import members
from data_pipeline.order import Order
from data_pipeline.shard import pack_sidecar, read_sidecar, sidecar_path
from data_pipeline.stream import heldout_loader, train_loader

RunOf = Callable[..., Run]

BATCH = 12
KINDS = ("garbled", "picture", "label", "truncated")
CASES = 500  # of the long campaign


class Case(NamedTuple):
    """A damaged copy of the data set, opened before the damage was done, and (shard, sample) of what is damaged."""

    dataset: Dataset
    damaged: set[tuple[int, int]]
    folder: Path  # of the run


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Dataset:
    return open_dataset(shutil.copytree(dataset.root, tmp_path / "copy"))


def spoil(split: Split, shard: int, number: int, kind: str, draws: Random) -> set[tuple[int, int]]:
    """Damage a sample in one of KINDS; returns all (shard, sample) that are damaged by it."""
    path = Path(split.shard_paths[shard])
    sidecar = read_sidecar(str(path), int(split.counts[shard]))
    offsets, crcs = sidecar.offsets.tolist(), sidecar.crcs.tolist()
    begin, end = offsets[number], offsets[number + 1]
    data = bytearray(path.read_bytes())
    label, picture = members(bytes(data[begin:end]))  # in the order of their extensions
    if kind == "truncated":  # from anywhere in the sample on, everything is gone
        os.truncate(path, draws.randrange(begin, end))
        return {(shard, later) for later in range(number, len(crcs))}
    if kind == "garbled":
        for _ in range(draws.randint(1, 20)):
            data[draws.randrange(begin, end)] = draws.randrange(256)
        data[begin + picture.begin] ^= 1  # should the others have changed nothing
    elif kind == "picture":  # written damaged: its checksum is right
        data[begin + picture.begin : begin + picture.end] = draws.randbytes(picture.end - picture.begin)
    else:
        data[begin + label.begin : begin + label.end] = b"9"
    crcs[number] = crcs[number] if kind == "garbled" else zlib.crc32(data[begin:end])
    path.write_bytes(data)
    Path(sidecar_path(str(path))).write_bytes(pack_sidecar(offsets, crcs))
    return {(shard, number)}


def run_over(data: Dataset, run: Run, folder: Path, **settings: Any) -> Run:
    """The run over a damaged copy, replacing what is damaged unless told otherwise."""
    changed = replace(run.data, **{"path": data.root, "on_damage": "replace", **settings})
    return replace(run, data=changed, runs=str(folder), name="run")


def order_of(data: Dataset, run: Run) -> Order:
    return Order(data.split("train").counts, run.seed, BATCH, run.data.lanes, run.data.piece)


def epoch(data: Dataset, run: Run, world: int = 1, first: int = 0) -> list[Batch]:
    """The global batches that hold epoch number `first`."""
    start = first * data.split("train").samples // BATCH
    steps = -(-data.split("train").samples // BATCH) + 1
    share = BATCH // world
    order = order_of(data, run)
    ranks = [train_loader(data, run, order, [(r * share, (r + 1) * share)], start * BATCH, steps) for r in range(world)]
    batches = []
    for parts in zip(*ranks, strict=True):
        names = [name for name, value in vars(parts[0]).items() if isinstance(value, torch.Tensor)]
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        batches.append(replace(parts[0], keys=[key for part in parts for key in part.keys], **whole))
    return batches


def lines(folder: Path) -> list[dict[str, object]]:
    path = folder / "run" / damage.FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_replaced(clean: Dataset, case: Case, run: Run, worlds: Iterator[int]) -> None:
    """Undamaged positions are as without damage, damaged ones hold another sample, each damaged one is written down."""
    truth = epoch(clean, replace(run, data=replace(run.data, path=clean.root)))
    order, paths = order_of(clean, run), clean.split("train").shard_paths
    for world in worlds:
        found = epoch(case.dataset, run, world)
        met = set()
        for wanted, got in zip(truth, found, strict=True):
            assert torch.equal(wanted.indices_B, got.indices_B)
            assert torch.equal(wanted.seeds_B, got.seeds_B)
            assert got.valid_B.all()
            _, shards, samples = order.lookup(wanted.indices_B.numpy())
            for slot, place in enumerate(zip(shards.tolist(), samples.tolist(), strict=True)):
                same = torch.equal(wanted.images_BCHW[slot], got.images_BCHW[slot])
                assert (place in case.damaged) == (wanted.keys[slot] != got.keys[slot])
                assert same or place in case.damaged
                assert int(got.labels[slot]) == int(got.keys[slot].rpartition("-")[2]) % 3
                met |= {place} & case.damaged
        written = {(Path(str(line["shard"])).name, line["sample"]) for line in lines(case.folder)}
        assert written == {(Path(paths[shard]).name, sample) for shard, sample in case.damaged}
        assert len(lines(case.folder)) == len(written)
        assert met == case.damaged


def campaign(dataset: Dataset, run: Run, tmp_path: Path, seed: int) -> int:
    """One seeded case: some damages of random kinds at random places, read at two world sizes; how many samples."""
    draws = Random(seed)
    data = open_dataset(shutil.copytree(dataset.root, tmp_path / f"copy-{seed}"))
    split, damaged = data.split("train"), set()
    for shard in draws.sample(range(len(split.counts)), draws.randint(1, 3)):
        damaged |= spoil(split, shard, draws.randrange(int(split.counts[shard])), draws.choice(KINDS), draws)
    folder = tmp_path / f"runs-{seed}"
    changed = run_over(data, run, folder)
    stopping = run_over(data, run, folder, on_damage="stop")
    with pytest.raises(Damage, match=r"shard-\d+\.tar: sample \d+ at byte \d+"):
        epoch(data, stopping)
    assert not folder.exists()
    check_replaced(dataset, Case(data, damaged, folder), changed, iter(draws.sample((1, 2, 3, 4, 6), 2)))
    shutil.rmtree(data.root)
    return len(damaged)


@pytest.mark.parametrize("seed", range(30))
def test_damage_is_stopped_at_or_replaced(dataset: Dataset, run_of: RunOf, tmp_path: Path, seed: int) -> None:
    campaign(dataset, run_of(augment=Augment()), tmp_path, seed)


@pytest.mark.slow
def test_damage_is_stopped_at_or_replaced_in_many_cases(
    dataset: Dataset, run_of: RunOf, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    cases = [campaign(dataset, run_of(augment=Augment()), tmp_path, seed) for seed in range(1000, 1000 + CASES)]
    record_property("damaged data sets", len(cases))
    record_property("damaged samples, each stopped at, replaced and written down", sum(cases))


def test_loader_processes_replace_alike_and_write_down_once(
    dataset: Dataset, copy: Dataset, run_of: RunOf, tmp_path: Path
) -> None:
    damaged = set()
    for shard, number, kind in ((1, 2, "garbled"), (4, 0, "picture"), (6, 3, "label")):
        damaged |= spoil(copy.split("train"), shard, number, kind, Random(0))
    case = Case(copy, damaged, tmp_path)
    check_replaced(dataset, case, run_over(copy, run_of(2), tmp_path), iter([1, 2]))
    keys = {str(line["key"]) for line in lines(tmp_path)}
    assert len([key for key in keys if key.startswith("class/picture-")]) == 2  # a garbled one has no key to trust
    assert damage.count(tmp_path / "run") == 3


def test_a_damaged_shard_is_replaced_from_elsewhere(
    dataset: Dataset, copy: Dataset, run_of: RunOf, tmp_path: Path
) -> None:
    damaged = spoil(copy.split("train"), 2, 0, "truncated", Random(0))
    assert len(damaged) == 6
    check_replaced(dataset, Case(copy, damaged, tmp_path), run_over(copy, run_of(), tmp_path), iter([1, 4]))


def test_a_repaired_sample_comes_back(dataset: Dataset, copy: Dataset, run_of: RunOf, tmp_path: Path) -> None:
    path = Path(copy.split("train").shard_paths[3])
    original = path.read_bytes()
    spoil(copy.split("train"), 3, 1, "garbled", Random(0))
    run = run_over(copy, run_of(), tmp_path)
    epoch(copy, run)
    assert damage.count(tmp_path / "run") == 1
    path.write_bytes(original)
    repaired, truth = epoch(copy, run), epoch(dataset, run)
    assert all(a.keys == b.keys for a, b in zip(repaired, truth, strict=True))


def test_every_sample_of_a_data_set_damaged(copy: Dataset, run_of: RunOf, tmp_path: Path) -> None:
    for path in copy.split("train").shard_paths:
        data = bytearray(Path(path).read_bytes())
        data[::700] = bytes(255 - byte for byte in data[::700])
        Path(path).write_bytes(data)
    with pytest.raises(DataError, match="and so is everything that may stand in for it"):
        epoch(copy, run_over(copy, run_of(), tmp_path))


def test_the_budget_is_of_distinct_samples_and_outlives_the_process(
    copy: Dataset, run_of: RunOf, tmp_path: Path
) -> None:
    split = copy.split("train")
    for shard in (0, 3):
        spoil(split, shard, 1, "garbled", Random(0))
    run = run_over(copy, run_of(), tmp_path, damage_budget=2)
    for number in range(3):
        epoch(copy, run, first=number)  # the same two again
    assert len(lines(tmp_path)) == 2
    spoil(split, 5, 0, "picture", Random(0))
    with pytest.raises(DataError) as refusal:
        epoch(copy, run)
    for part in ("shard-000005.tar", "sample 0", "cannot be decoded", "lists 2 damaged", "data.damage_budget = 2"):
        assert part in str(refusal.value)
    assert len(lines(tmp_path)) == 2
    with pytest.raises(DataError, match=r"data\.damage_budget = 0"):
        epoch(copy, run_over(copy, run_of(), tmp_path / "new", damage_budget=0))


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_missing_shard_is_not_replaced(copy: Dataset, run_of: RunOf, tmp_path: Path, suffix: str) -> None:
    Path(copy.split("train").shard_paths[2]).with_suffix(suffix).unlink()
    with pytest.raises(StoreError, match=rf"shard-000002\{suffix}: .*(missing|No such file)"):
        epoch(copy, run_over(copy, run_of(), tmp_path))
    assert lines(tmp_path) == []


def test_a_run_folder_that_cannot_be_written_to_is_named(copy: Dataset, run_of: RunOf, tmp_path: Path) -> None:
    spoil(copy.split("train"), 0, 1, "garbled", Random(0))
    (tmp_path / "run").write_text("a file, no folder")
    with pytest.raises(DataError, match=r"bad-samples\.jsonl: a damaged sample cannot be written down"):
        epoch(copy, run_over(copy, run_of(), tmp_path))


@pytest.mark.parametrize("world", [1, 3])
def test_an_evaluation_leaves_damaged_samples_out(
    dataset: Dataset, copy: Dataset, run_of: RunOf, tmp_path: Path, world: int
) -> None:
    damaged = spoil(copy.split("heldout"), 0, 2, "picture", Random(0))
    run = run_over(copy, run_of(), tmp_path)
    seen = []
    for rank in range(world):
        clean = heldout_loader(dataset, "heldout", run_of(), rank, world)
        for batch, truth in zip(heldout_loader(copy, "heldout", run, rank, world), clean, strict=True):
            for slot, index in enumerate(batch.indices_B.tolist()):
                if batch.valid_B[slot]:
                    seen.append(index)
                    assert torch.equal(batch.images_BCHW[slot], truth.images_BCHW[slot])
    assert sorted(seen) == [n for n in range(dataset.split("heldout").samples) if (0, n) not in damaged]
    with pytest.raises(Damage):
        list(heldout_loader(copy, "heldout", run_over(copy, run_of(), tmp_path, on_damage="stop"), 0, 1))


@given(
    samples=st.integers(1, 2**40), index=st.integers(0, 2**50), seed=st.integers(0, 2**63 - 1), more=st.integers(0, 99)
)
@settings(max_examples=100, deadline=None)
def test_stand_ins_are_a_function_of_the_position(samples: int, index: int, seed: int, more: int) -> None:
    found = stand_ins(index, samples, seed)
    assert found.shape == (NEAR + FAR,)
    assert set((found // samples).tolist()) == {index // samples}
    assert found[0] % samples == (index + 1) % samples
    assert np.array_equal(found, stand_ins(index, samples, seed))
    if samples > 10**6:
        assert not np.array_equal(found[NEAR:], stand_ins(index + more + 1, samples, seed)[NEAR:])
        assert not np.array_equal(found[NEAR:], stand_ins(index, samples, seed ^ 1)[NEAR:])


NOTING = """
import sys
from random import Random
from data_pipeline.damage import BadSamples, Damage
bad = BadSamples(sys.argv[1], 1000)
for number in Random(int(sys.argv[2])).sample(range(80), 60):
    bad.note("a.tar", number, Damage("reason " * 50, f"key {number}"))
"""


def test_processes_write_down_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", NOTING, str(tmp_path / "run")]
    writers = [subprocess.Popen([*command, str(seed)], env=environment) for seed in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    numbers = [int(str(line["sample"])) for line in lines(tmp_path)]
    assert sorted(numbers) == sorted({number for seed in range(4) for number in Random(seed).sample(range(80), 60)})


def test_a_line_cut_off_by_a_kill_does_no_harm(tmp_path: Path) -> None:
    BadSamples(str(tmp_path / "run"), 9).note("a.tar", 1, Damage("one"))
    with (tmp_path / "run" / damage.FILE).open("a") as file:
        file.write('{"shard": "a.tar", "samp')
    bad = BadSamples(str(tmp_path / "run"), 2)
    bad.note("a.tar", 2, Damage("two"))
    bad.note("a.tar", 1, Damage("one"))
    assert damage.count(tmp_path / "run") == 2
    with pytest.raises(DataError, match="lists 2 damaged samples"):
        bad.note("a.tar", 3, Damage("three"))


def test_no_file_means_no_damage(tmp_path: Path) -> None:
    assert damage.count(tmp_path) == 0
