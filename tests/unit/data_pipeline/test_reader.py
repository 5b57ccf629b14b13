"""The reader: what a sample becomes depends on (seed, epoch, position) and its own bytes alone."""

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from configs.schema import Augment, Run
from data_pipeline import reader
from data_pipeline.augment import eval_view, targets, train_view
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.decode import decode
from data_pipeline.errors import Damage
from data_pipeline.manifest import Dataset, Split
from data_pipeline.order import Order, sample_seed
from data_pipeline.reader import Part
from data_pipeline.shard import pack_sidecar
from data_pipeline.stream import Batch, heldout_loader, train_loader

RunOf = Callable[..., Run]
PictureOf = Callable[..., Picture]

RANDOM = Augment(randaugment_layers=2, randaugment_magnitude=15)


def batches(dataset: Dataset, run: Run, start: int = 0, steps: int = 10) -> list[Batch]:
    order = Order(dataset.split("train").counts, run.seed, 12, run.data.lanes, run.data.piece)
    return list(train_loader(dataset, run, order, [(0, 12)], start, steps))


@pytest.mark.parametrize("augment", [Augment(), RANDOM])
def test_pixels_follow_from_the_bytes_and_the_position_alone(
    dataset: Dataset, run_of: RunOf, picture_of: PictureOf, augment: Augment
) -> None:
    samples, epochs = dataset.split("train").samples, set()
    for batch in batches(dataset, run_of(augment=augment), 60, 4):
        for slot, key in enumerate(batch.keys):
            index = batch.indices_B[slot].numpy()
            (seed,) = sample_seed(3, index[None] // samples, index[None] % samples)
            pixels = decode(picture_of(int(key.rpartition("-")[2])).load(), 10**6)
            assert torch.equal(batch.images_BCHW[slot], train_view(pixels, 32, augment, int(seed)))
            assert int(batch.seeds_B[slot]) == seed
            epochs.add(int(index) // samples)
    assert len(epochs) == 2


def test_the_same_sample_looks_different_at_another_position(dataset: Dataset, run_of: RunOf) -> None:
    samples = dataset.split("train").samples
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in batches(dataset, run_of(augment=Augment()), 0, 2 * samples // 12):
        for slot, key in enumerate(batch.keys):
            seen.setdefault(key, []).append(batch.images_BCHW[slot])
    twice = [views for views in seen.values() if len(views) > 1]
    assert len(twice) > samples // 2
    assert not any(torch.equal(*views[:2]) for views in twice)


def test_evaluation_views_follow_from_the_bytes_alone(dataset: Dataset, run_of: RunOf, picture_of: PictureOf) -> None:
    for batch in heldout_loader(dataset, "heldout", run_of(), 0, 1):
        for slot, key in enumerate(batch.keys):
            pixels = decode(picture_of(int(key.rpartition("-")[2])).load(), 10**6)
            assert torch.equal(batch.images_BCHW[slot], eval_view(pixels, 32, run_of().augment))


@pytest.mark.parametrize(("augment", "last"), [(Augment(), True), (RANDOM, False)])
def test_the_memory_format_does_not_depend_on_the_pictures(
    dataset: Dataset, run_of: RunOf, augment: Augment, last: bool
) -> None:
    for batch in batches(dataset, run_of(augment=augment), 0, 5):
        assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def handmade(folder: Path, members: list[dict[str, bytes]]) -> Dataset:
    """A data set of several labels out of one training shard with these members, as somebody else may write it."""
    (folder / "train").mkdir(parents=True)
    path, file, offsets = folder / "train" / "shard-000000.tar", io.BytesIO(), [0]
    writer = webdataset.TarWriter(file, encoder=False, mtime=0)
    for number, contents in enumerate(members):
        writer.write({"__key__": f"s{number}", **contents})
        offsets.append(writer.tarstream.offset)
    writer.close()
    data = file.getvalue()
    path.write_bytes(data)
    crcs = [zlib.crc32(data[begin:end]) for begin, end in pairwise(offsets)]
    path.with_suffix(".idx").write_bytes(pack_sidecar(offsets, crcs))
    empty = write_dataset([stub(n) for n in range(30)], folder / "other", ["a", "b", "c"], "multi", {}, 50)
    counts = empty.split("train").counts[:1] * 0 + len(members)
    split = Split("train", str(folder), len(members), counts, "", (str(path),), ())
    return replace(empty, root=str(folder), splits={"train": split})


def stub(number: int) -> Picture:
    return Picture(f"k{number}", "png", (0,), f"k{number}", lambda: b"x")


def test_soft_labels_reach_the_loss(tmp_path: Path, run_of: RunOf, picture_of: PictureOf) -> None:
    soft = {"labels": [2, 0], "weights": [0.75, 0.25]}
    data = handmade(
        tmp_path,
        [
            {"png": picture_of(1).load(), "json": json.dumps(soft).encode()},
            {"png": picture_of(2).load(), "json": b'{"labels": [1]}'},
            {"png": picture_of(4).load(), "json": b'{"labels": []}'},
        ],
    )
    batch = batches(data, run_of(path=tmp_path, augment=Augment()), 0, 1)[0]
    assert batch.weights_BL is not None
    assert batch.weights_BL.dtype == torch.float32
    wanted = {"s0": [0.25, 0, 0.75], "s1": [0, 1, 0], "s2": [0, 0, 0]}
    for loss in ("softmax", "sigmoid"):
        rows = targets(batch, 3, 0.0, loss)
        assert {key: row.tolist() for key, row in zip(batch.keys, rows, strict=True)} == wanted
    assert batch.to("meta").weights_BL.device.type == "meta"  # type: ignore[union-attr]


def test_labels_without_weights_carry_none(dataset: Dataset, run_of: RunOf) -> None:
    assert batches(dataset, run_of(), 0, 1)[0].weights_BL is None


def test_two_labels_in_a_data_set_of_single_labels_are_damage(
    tmp_path: Path, run_of: RunOf, picture_of: PictureOf
) -> None:
    two = handmade(tmp_path, [{"png": picture_of(1).load(), "json": b'{"labels": [0, 1]}'}])
    with pytest.raises(Damage, match="key 's0': 2 labels in a data set of single labels") as refusal:
        batches(replace(two, label_kind="single"), run_of(path=tmp_path), 0, 1)
    assert refusal.value.key == "s0"


MIXED = replace(RANDOM, mixup_alpha=0.4, cutmix_alpha=1.0)


def parts_of(dataset: Dataset, run: Run, steps: int) -> dict[Part, list[Batch]]:
    """The same steps as each kind of stage of a pipeline reads them."""
    parts: tuple[Part, ...] = ("all", "labels", "seeds")
    order = Order(dataset.split("train").counts, run.seed, 12, run.data.lanes, run.data.piece)
    return {part: list(train_loader(dataset, run, order, [(0, 4), (4, 12)], 24, steps, part)) for part in parts}


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one for each picture that is decoded."""
    decoded: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        decoded.append(1)
        return decode(*arguments)

    monkeypatch.setattr(reader, "decode", counted)
    return decoded


@pytest.mark.parametrize("on_damage", ["stop", "replace"])
def test_stages_read_the_same_samples_each_what_it_needs(
    dataset: Dataset, run_of: RunOf, tmp_path: Path, on_damage: Any
) -> None:
    run = run_of(augment=MIXED)
    run = replace(run, runs=str(tmp_path), data=replace(run.data, on_damage=on_damage))
    found = parts_of(dataset, run, 5)
    for whole, labels, seeds in zip(found["all"], found["labels"], found["seeds"], strict=True):
        for part in (labels, seeds):
            for name in ("seeds_B", "indices_B", "valid_B"):
                assert torch.equal(getattr(part, name), getattr(whole, name)), name
        assert labels.keys == whole.keys
        for name in ("labels", "kept_B", "boxes_B4"):
            assert torch.equal(getattr(labels, name), getattr(whole, name)), name
        wanted = [targets(batch, 3, 0.1, "softmax") for batch in (whole, labels)]
        assert torch.equal(*wanted)
        assert len(whole.images_BCHW) == len(seeds.images_BCHW)
        assert seeds.images_BCHW.numel() == 0
    assert [len(batch.keys) for batch in found["all"]] == [4, 8] * 5


@pytest.mark.parametrize(("on_damage", "decodes"), [("stop", 0), ("replace", 24)])
def test_the_stage_of_the_labels_decodes_only_where_damage_is_replaced(
    dataset: Dataset, run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_damage: Any, decodes: int
) -> None:
    run = run_of()
    run = replace(run, runs=str(tmp_path), data=replace(run.data, on_damage=on_damage))
    order = Order(dataset.split("train").counts, run.seed, 12, run.data.lanes, run.data.piece)
    decoded = count_decoded(monkeypatch)
    for part, expected in (("all", 24), ("labels", decodes), ("seeds", 0)):
        decoded.clear()
        list(train_loader(dataset, run, order, [(0, 12)], 0, 2, part))  # type: ignore[arg-type]
        assert len(decoded) == expected, part


def test_a_replaced_sample_is_the_same_on_the_stages_of_pictures_and_labels(
    tmp_path: Path, run_of: RunOf, picture_of: PictureOf
) -> None:
    members = [{"png": picture_of(n).load(), "json": json.dumps({"labels": [n % 3]}).encode()} for n in (1, 2, 4, 5)]
    data = handmade(tmp_path / "set", [*members, {"png": b"no picture", "json": b'{"labels": [2]}'}])
    run = run_of(path=tmp_path / "set", augment=Augment())
    run = replace(run, runs=str(tmp_path / "runs"), data=replace(run.data, on_damage="replace"))
    found = parts_of(data, run, 2)
    keys = {key for batch in found["all"] for key in batch.keys}
    assert keys == {"s0", "s1", "s2", "s3"}
    for whole, labels in zip(found["all"], found["labels"], strict=True):
        assert labels.keys == whole.keys
        assert torch.equal(labels.labels, whole.labels)
        assert torch.equal(labels.valid_B, whole.valid_B)


def test_stages_score_the_same_held_out_samples(dataset: Dataset, run_of: RunOf) -> None:
    parts: tuple[Part, ...] = ("all", "labels", "seeds")
    found = [list(heldout_loader(dataset, "heldout", run_of(), 1, 2, part)) for part in parts]
    for whole, labels, seeds in zip(*found, strict=True):
        assert torch.equal(labels.labels, whole.labels)
        assert torch.equal(labels.valid_B, whole.valid_B)
        assert torch.equal(seeds.indices_B, whole.indices_B)
