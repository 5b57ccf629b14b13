"""FFCV's .beton files written and read by the real FFCV: the same samples in the same order as in the tars."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from configs.errors import InputError
from configs.schema import Data, Run
from data_pipeline.augment import eval_view, train_view
from data_pipeline.batch import Batch
from data_pipeline.building.adopt import adopt
from data_pipeline.building.beton import Form, verify_beton, write_beton
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.building.verify import verify
from data_pipeline.building.writing import aside
from data_pipeline.decode import decode
from data_pipeline.errors import Damage, DataError
from data_pipeline.ffcv import BetonShards, open_betons
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.order import Order
from data_pipeline.prefetch import Fetched
from data_pipeline.stream import heldout_loader, open_data, train_loader

RunOf = Callable[..., Run]
PictureOf = Callable[..., Picture]

HERE = importlib.util.find_spec("ffcv") is not None
needs_ffcv = pytest.mark.skipif(
    not HERE, reason="FFCV IS NOT INSTALLED: no .beton was written or read; pip install -e '.[ffcv]' and try again"
)


def batches(dataset: Dataset, run: Run, slices: list[tuple[int, int]], start: int = 0, steps: int = 12) -> list[Batch]:
    order = Order(dataset.split("train").counts, run.seed, 12, run.data.lanes, run.data.piece)
    return list(train_loader(dataset, run, order, slices, start, steps))


def same(one: Batch, other: Batch, pixels: bool) -> None:
    assert one.keys == other.keys
    for name in ("labels", "seeds_B", "indices_B", "valid_B"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.weights_BL is None) == (other.weights_BL is None)
    if one.weights_BL is not None and other.weights_BL is not None:
        assert torch.equal(one.weights_BL, other.weights_BL)
    if pixels:
        assert torch.equal(one.images_BCHW, other.images_BCHW)


@pytest.fixture(scope="session")
def betons(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Both splits as .beton files: what data.path names them by."""
    folder = tmp_path_factory.mktemp("betons")
    for split in ("train", "heldout"):
        write_beton(dataset.root, str(folder / f"{split}.beton"), split, Form(jpeg_quality=100))
    return f"{folder / 'train.beton'},{folder / 'heldout.beton'}"


@needs_ffcv
def test_batches_are_those_of_the_tars_but_for_the_encoding(betons: str, dataset: Dataset, run_of: RunOf) -> None:
    run = run_of(path=betons)
    data = open_data(run)
    assert (data.vocabulary, data.label_counts) == (dataset.vocabulary, dataset.label_counts)
    whole = batches(data, run, [(0, 12)])
    for ours, tars in zip(whole, batches(dataset, run_of(), [(0, 12)]), strict=True):
        same(ours, tars, pixels=False)
    plain = run_of(path=betons, augment=replace(run.augment, randaugment_layers=0))
    shards = BetonShards(data.split("train"))
    order = Order(data.split("train").counts, run.seed, 12, run.data.lanes, run.data.piece)
    for batch in batches(data, plain, [(0, 12)], 12, 3):
        _, shard, number = order.lookup(batch.indices_B.numpy())
        for slot in range(12):
            stored = shards.read(int(shard[slot]), int(number[slot]), 3)
            view = train_view(decode(stored.picture, 10**6), 32, plain.augment, int(batch.seeds_B[slot]))
            assert torch.equal(batch.images_BCHW[slot], view)
    from_tars = batches(dataset, replace(plain, data=replace(plain.data, path=dataset.root)), [(0, 12)], 12, 3)
    for again, theirs in zip(batches(data, plain, [(0, 12)], 12, 3), from_tars, strict=True):
        # Noise loses much in a JPEG; yet it is the same view of the same picture, not of its neighbour in the batch.
        pictures, others = again.images_BCHW.float(), theirs.images_BCHW.float()
        assert (pictures - others).abs().mean() < (pictures - others.roll(1, 0)).abs().mean() / 2


@needs_ffcv
def test_it_resumes_exactly_at_any_step_and_number_of_ranks(betons: str, run_of: RunOf) -> None:
    run = run_of(path=betons)
    data = open_data(run)
    whole = batches(data, run, [(0, 12)])
    for step in (1, 5, 11):
        for ours, expected in zip(batches(data, run, [(0, 12)], 12 * step, 12 - step), whole[step:], strict=True):
            same(ours, expected, pixels=True)
    ranks = [batches(data, run, [(rank * 4, rank * 4 + 4)]) for rank in range(3)]
    for step, expected in enumerate(whole):
        assert [key for rank in ranks for key in rank[step].keys] == expected.keys
        assert torch.equal(torch.cat([rank[step].images_BCHW for rank in ranks]), expected.images_BCHW)


@needs_ffcv
@pytest.mark.slow
def test_worker_processes_read_the_same_and_write_the_same(
    betons: str, dataset: Dataset, run_of: RunOf, tmp_path: Path
) -> None:
    data = open_data(run_of(path=betons))
    alone, two = (batches(data, run_of(workers, path=betons), [(0, 12)]) for workers in (0, 2))
    for ours, expected in zip(two, alone, strict=True):
        same(ours, expected, pixels=True)
    write_beton(dataset.root, str(tmp_path / "two.beton"), "train", Form(jpeg_quality=100), workers=2)
    assert (tmp_path / "two.beton").read_bytes() == Path(betons.split(",")[0]).read_bytes()
    assert verify_beton(str(tmp_path / "two.beton"), deep=True, workers=2).decoded == data.split("train").samples


@needs_ffcv
def test_held_out_samples_are_scored_once_with_their_labels(betons: str, dataset: Dataset, run_of: RunOf) -> None:
    data, run = open_data(run_of(path=betons)), run_of(path=betons)
    shards = BetonShards(data.split("heldout"))
    for rank in range(2):
        found = heldout_loader(data, "heldout", run, rank, 2)
        for ours, tars in zip(found, heldout_loader(dataset, "heldout", run_of(), rank, 2), strict=True):
            same(ours, tars, pixels=False)
            picture = shards.read(0, 0, 3).picture
            if ours.indices_B[0] == 0:
                assert torch.equal(ours.images_BCHW[0], eval_view(decode(picture, 10**6), 32, run.augment))


@needs_ffcv
def test_several_and_soft_labels_come_back_as_they_were(
    tmp_path: Path, picture_of: PictureOf, run_of: RunOf, soft: Callable[[Path], Dataset]
) -> None:
    tars = soft(tmp_path)
    write_beton(tars.root, str(tmp_path / "soft.beton"))
    data = open_betons(str(tmp_path / "soft.beton"))
    part, shards = tars.split("train"), BetonShards(data.split("train"))
    stored = Fetched(part, Data(path=tars.root)).open()
    for shard, samples in enumerate(part.counts.tolist()):
        for number in range(samples):
            ours, theirs = shards.read(shard, number, 3), stored.read(shard, number, 3)
            assert (ours.key, ours.labels, ours.weights) == (theirs.key, theirs.labels, theirs.weights)
    run = run_of(path=tmp_path / "soft.beton")
    for ours_B, theirs_B in zip(
        batches(data, run, [(0, 12)]), batches(tars, run_of(path=tars.root), [(0, 12)]), strict=True
    ):
        same(ours_B, theirs_B, pixels=False)


@pytest.fixture
def soft(picture_of: PictureOf) -> Callable[[Path], Dataset]:
    """Pictures with none to three labels in any order."""

    def build(folder: Path) -> Dataset:
        chosen = [(), (2,), (2, 0), (1, 2, 0)]
        pictures = [picture_of(number, chosen[number % 4]) for number in range(40)]
        return write_dataset(pictures, folder / "soft", ["a", "b", "c"], "multi", {}, 6)

    return build


@needs_ffcv
def test_ffcvs_own_loader_reads_the_file(betons: str, dataset: Dataset) -> None:
    from ffcv.fields import JSONField
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    path, part = betons.split(",")[0], dataset.split("train")
    wanted = [12, 3, 40, 3]
    pipelines: dict[str, Any] = {"image": [CenterCropRGBImageDecoder((16, 16), 1.0), ToTensor()]}
    loader = Loader(
        path, batch_size=2, num_workers=1, order=OrderOption.SEQUENTIAL, indices=wanted, pipelines=pipelines
    )
    stored, starts = Fetched(part, Data(path=dataset.root)).open(), np.cumsum(part.counts) - part.counts
    found = [
        (int(label), notes)
        for _, labels, rows, _ in loader
        for label, notes in zip(labels, JSONField.unpack(rows), strict=True)
    ]
    assert len(found) == len(wanted)
    for index, (label, notes) in zip(wanted, found, strict=True):
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        sample = stored.read(shard, index - int(starts[shard]), 3)
        assert (notes["key"], notes["labels"], (label,)) == (sample.key, list(sample.labels), sample.labels)


@needs_ffcv
def test_a_second_call_writes_nothing_and_a_different_one_is_refused(betons: str, dataset: Dataset) -> None:
    path = betons.split(",")[0]
    before = Path(path).stat()
    assert "nothing to do" in write_beton(dataset.root, path, "train", Form(jpeg_quality=100))
    with pytest.raises(InputError, match="made otherwise"):
        write_beton(dataset.root, path, "train", Form(jpeg_quality=90))
    assert Path(path).stat().st_mtime_ns == before.st_mtime_ns


@needs_ffcv
def test_a_damaged_sample_leaves_no_file(tmp_path: Path, dataset: Dataset) -> None:
    root = shutil.copytree(dataset.root, tmp_path / "copy")
    shard = Path(open_dataset(root).split("train").shard_paths[2])
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=shard.name):
        write_beton(str(root), str(tmp_path / "x.beton"))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@needs_ffcv
def test_what_a_killed_writer_left_is_deleted_and_a_living_ones_is_not(tmp_path: Path, dataset: Dataset) -> None:
    path = tmp_path / "x.beton"
    ended = subprocess.Popen(["true"])
    ended.wait()
    prefix = aside(path).name.removesuffix(str(os.getpid()))
    dead, living = (tmp_path / f"{prefix}{process}" for process in (ended.pid, os.getppid()))
    dead.write_bytes(b"half")
    living.write_bytes(b"half")
    write_beton(dataset.root, str(path), "heldout")
    assert {found.name for found in tmp_path.iterdir()} == {living.name, "x.beton", "x.beton.json"}


@needs_ffcv
def test_labels_in_another_field_of_adopted_tars(tmp_path: Path, picture_of: PictureOf) -> None:
    for split, numbers in (("train", range(8)), ("heldout", range(8, 12))):
        with webdataset.TarWriter(str(tmp_path / f"{split}.tar"), encoder=False) as writer:
            for number in numbers:
                notes = json.dumps({"what": ["cat", "dog"][number % 2]}).encode()
                writer.write({"__key__": f"k{number}", "png": picture_of(1 + 3 * number).load(), "json": notes})
    tars = [str(tmp_path / f"{split}.tar") for split in ("train", "heldout")]
    data = adopt(tars[:1], tmp_path / "set", tars[1:], label_field="what")
    write_beton(data.root, str(tmp_path / "x.beton"))
    (part,) = open_betons(str(tmp_path / "x.beton")).splits.values()
    found = [BetonShards(part).read(0, number, 2) for number in range(8)]
    names = [data.vocabulary[sample.labels[0]] for sample in found]
    assert {sample.key: name for sample, name in zip(found, names, strict=True)} == {
        f"k{number}": ["cat", "dog"][number % 2] for number in range(8)
    }


@needs_ffcv
def test_large_pictures_are_made_smaller(tmp_path: Path, dataset: Dataset) -> None:
    path = str(tmp_path / "small.beton")
    write_beton(dataset.root, path, "heldout", Form(max_resolution=24))
    (part,) = open_betons(path).splits.values()
    shards, found = BetonShards(part), []
    for shard, samples in enumerate(part.counts.tolist()):
        found += [Image.open(io.BytesIO(shards.read(shard, number, 3).picture)).size for number in range(samples)]
    assert max(max(size) for size in found) == 24


def flipped(path: str, folder: Path, places: list[int]) -> str:
    """A copy of a .beton with other bytes at `places`."""
    copy = folder / "copy.beton"
    data = bytearray(Path(path).read_bytes())
    for place in places:
        data[place] ^= 0x55
    copy.write_bytes(data)
    Path(f"{copy}.json").write_bytes(Path(f"{path}.json").read_bytes())
    return str(copy)


@needs_ffcv
def test_damage_is_named_and_replaced_if_asked_for(betons: str, tmp_path: Path, run_of: RunOf) -> None:
    train = betons.split(",")[0]
    (part,) = open_betons(train).splits.values()
    begin = int(BetonShards(part)._places[7][0])
    copy = flipped(train, tmp_path, [begin + 100])
    data, run = open_betons(copy), run_of(path=copy)
    with pytest.raises(Damage, match=r"copy\.beton: sample 7 \(train/shard-0*1\.tar:1\).*checksum"):
        batches(data, run, [(0, 12)])
    instead = replace(run, runs=str(tmp_path), name="run", data=replace(run.data, on_damage="replace"))
    truth = [key for batch in batches(open_betons(train), run_of(path=train), [(0, 12)]) for key in batch.keys]
    found = [key for batch in batches(data, instead, [(0, 12)]) for key in batch.keys]
    assert 0 < sum(a != b for a, b in zip(found, truth, strict=True)) <= 4
    report = verify(copy)
    assert [finding.sample for finding in report.findings] == [-1, 1]
    assert not verify(train, deep=True).problems


@needs_ffcv
def test_no_flipped_byte_passes(betons: str, tmp_path: Path) -> None:
    train = betons.split(",")[0]
    (part,) = open_betons(train).splits.values()
    shards = BetonShards(part)
    places = [(shard, number) for shard, each in enumerate(part.counts.tolist()) for number in range(each)]
    truth = [shards.read(*place, 3) for place in places]
    used = [int(edge) for row in shards._places for edge in (row[0], row[0] + row[1] - 1, row[2], row[2] + row[3] - 1)]
    size, head, refused = Path(train).stat().st_size, 24 + 4 * 1041 + 80 * len(places), 0
    for seed in range(60):
        draws = Random(seed)
        where = [range(head), range(size - 48 * len(places), size), range(min(used), max(used))][seed % 3]
        copy = flipped(train, tmp_path, [draws.choice(where) for _ in range(3)])
        bad = False
        try:
            opened = BetonShards(open_betons(copy).split("train"))
        except DataError:
            refused += 1
            continue
        for place, expected in zip(places, truth, strict=True):
            try:
                assert opened.read(*place, 3) == expected
            except DataError:
                bad = True
        refused += bad
    assert refused >= 40
