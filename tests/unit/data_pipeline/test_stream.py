"""The stream: the same batches at any number of ranks and workers, resumed anywhere, and damage that is named."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import InputError
from configs.schema import Augment, Run
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.decode import decode
from data_pipeline.errors import DataError
from data_pipeline.manifest import Dataset, open_dataset
from data_pipeline.order import Order, sample_seed
from data_pipeline.stream import Batch, heldout_loader, train_loader

RunOf = Callable[..., Run]
PictureOf = Callable[..., Picture]

BATCH = 12
MIXED = Augment(randaugment_layers=2, randaugment_magnitude=15, mixup_alpha=0.8, cutmix_alpha=1.0)


def order_of(dataset: Dataset, run: Run) -> Order:
    return Order(dataset.split("train").counts, run.seed, BATCH, run.data.lanes, run.data.piece)


def global_batches(dataset: Dataset, run: Run, world: int, micro: int, start: int, steps: int) -> list[Batch]:
    """The global batches of `steps` steps, put together from every rank's micro-batches."""
    share = BATCH // world
    slices = [[(r * share + m, r * share + m + micro) for m in range(0, share, micro)] for r in range(world)]
    order = order_of(dataset, run)
    ranks = [list(train_loader(dataset, run, order, slices[r], start, steps)) for r in range(world)]
    passes = share // micro
    return [joined([b for rank in ranks for b in rank[s * passes : (s + 1) * passes]]) for s in range(steps)]


def joined(parts: list[Batch]) -> Batch:
    tensors = [name for name, value in vars(parts[0]).items() if isinstance(value, torch.Tensor)]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in tensors}
    return replace(parts[0], keys=[key for part in parts for key in part.keys], **whole)


def equal(a: Batch, b: Batch) -> bool:
    names = ("images_BCHW", "labels", "seeds_B", "indices_B", "valid_B", "kept_B", "boxes_B4")
    tensors = [(getattr(a, name), getattr(b, name)) for name in names]
    return a.keys == b.keys and all(x is y if x is None else torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 4), (2, 6), (2, 2), (3, 4), (3, 2)])
def test_batches_do_not_depend_on_the_layout(dataset: Dataset, run_of: RunOf, world: int, micro: int) -> None:
    run = run_of(augment=MIXED)
    whole = global_batches(dataset, run, 1, 12, 30, 4)
    found = global_batches(dataset, run, world, micro, 30, 4)
    assert all(equal(a, b) for a, b in zip(whole, found, strict=True))
    assert whole[0].kept_B is not None


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("world", [1, 4])
def test_batches_do_not_depend_on_the_workers(dataset: Dataset, run_of: RunOf, workers: int, world: int) -> None:
    alone = global_batches(dataset, run_of(), 1, 12, 0, 3)
    found = global_batches(dataset, run_of(workers), world, 3, 0, 3)
    assert all(equal(a, b) for a, b in zip(alone, found, strict=True))


def test_a_resumed_stream_goes_on_exactly(dataset: Dataset, run_of: RunOf) -> None:
    run = run_of()
    whole = global_batches(dataset, run, 1, 12, 0, 8)
    for step in range(1, 8):
        resumed = global_batches(dataset, run, 2, 3, step * BATCH, 8 - step)
        assert all(equal(a, b) for a, b in zip(whole[step:], resumed, strict=True))


def test_an_epoch_holds_every_sample_once_and_seeds_follow_the_position(dataset: Dataset, run_of: RunOf) -> None:
    run, samples = run_of(), dataset.split("train").samples
    steps = -(-2 * samples // BATCH)
    batches = global_batches(dataset, run, 1, 12, 0, steps)
    keys = [key for batch in batches for key in batch.keys][: 2 * samples]
    assert len(set(keys[:samples])) == samples
    assert sorted(keys[:samples]) == sorted(keys[samples:])
    assert keys[:samples] != keys[samples:]
    seam = batches[samples // BATCH]
    position = seam.indices_B.numpy()
    assert len(set((position // samples).tolist())) == 2
    assert seam.seeds_B.tolist() == sample_seed(run.seed, position // samples, position % samples).tolist()


def test_labels_and_pixels_belong_to_the_key(dataset: Dataset, run_of: RunOf, picture_of: PictureOf) -> None:
    run = run_of(augment=Augment(crop="resize", flip=False))
    batch = global_batches(dataset, run, 1, 12, 0, 1)[0]
    for slot, key in enumerate(batch.keys):
        number = int(key.rpartition("-")[2])
        assert int(batch.labels[slot]) == number % 3
        mean = decode(picture_of(number).load(), 10**6).float().mean()
        assert abs(float(batch.images_BCHW[slot].float().mean() - mean)) < 4


def test_the_global_generator_is_left_alone(dataset: Dataset, run_of: RunOf) -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    global_batches(dataset, run_of(), 1, 12, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (50, 0), (1, 2), (3, 2)])
def test_held_out_samples_come_exactly_once(dataset: Dataset, run_of: RunOf, world: int, workers: int) -> None:
    ranks = [list(heldout_loader(dataset, "heldout", run_of(workers), rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(batch.valid_B) for batches in ranks for batch in batches}) == 1
    assert all(len(batch.valid_B) <= 4 for batches in ranks for batch in batches)
    by_pass = [batch for passes in zip(*ranks, strict=True) for batch in passes]
    seen = [index for batch in by_pass for index in batch.indices_B[batch.valid_B].tolist()]
    assert seen == list(range(dataset.split("heldout").samples))
    assert all(batch.kept_B is None for batch in by_pass)


def test_many_labels_are_padded(tmp_path: Path, run_of: RunOf, picture_of: PictureOf) -> None:
    pictures = [picture_of(number, tuple(range(number % 4))) for number in range(40)]
    data = write_dataset(pictures, tmp_path / "set", ["a", "b", "c"], "multi", {}, 8)
    batch = next(train_loader(data, run_of(path=data.root), order_of(data, run_of()), [(0, 12)], 0, 1))
    assert batch.labels.shape == (12, 3)
    for slot, key in enumerate(batch.keys):
        count = int(key.rpartition("-")[2]) % 4
        assert batch.labels[slot].tolist() == [*range(count), *[-1] * (3 - count)]


def test_a_moved_batch_keeps_everything(dataset: Dataset, run_of: RunOf) -> None:
    batch = next(train_loader(dataset, run_of(augment=MIXED), order_of(dataset, run_of()), [(0, 12)], 0, 1))
    moved = batch.to("meta")
    assert moved.images_BCHW.device.type == "meta"
    assert moved.boxes_B4 is not None
    assert moved.boxes_B4.device.type == "meta"
    assert moved.keys == batch.keys


def test_wrong_slices_and_orders_are_refused(dataset: Dataset, run_of: RunOf) -> None:
    run = run_of()
    with pytest.raises(InputError, match="must lie inside the global batch"):
        next(train_loader(dataset, run, order_of(dataset, run), [(6, 13)], 0, 1))
    with pytest.raises(InputError, match="must be even"):
        next(train_loader(dataset, run_of(augment=MIXED), order_of(dataset, run), [(0, 3)], 0, 1))
    with pytest.raises(InputError, match="made for other shards"):
        next(train_loader(dataset, run, Order(np.array([5, 5]), 0, 12, 5, 4), [(0, 12)], 0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_stops_the_stream_and_is_named(dataset: Dataset, run_of: RunOf, tmp_path: Path, workers: int) -> None:
    root = Path(shutil.copytree(dataset.root, tmp_path / "copy"))
    path = root / "train" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 255
    path.write_bytes(data)
    copy = open_dataset(root)
    run = replace(run_of(workers), data=replace(run_of(workers).data, path=str(root)))
    with pytest.raises(DataError) as refusal:
        list(train_loader(copy, run, order_of(copy, run), [(0, 12)], 0, 6))
    assert str(refusal.value).startswith(f"{path}: sample 0 at byte 0, key 'class/picture-")
    assert "Traceback" not in str(refusal.value)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path: Path, run_of: RunOf, picture_of: PictureOf) -> None:
    pictures = [replace(picture_of(number), load=lambda: b"no picture") for number in range(40)]
    data = write_dataset(pictures, tmp_path / "set", ["a", "b", "c"], "single", {}, 8)
    with pytest.raises(
        DataError, match=r"shard-\d+\.tar: sample \d at byte \d+, key 'class/picture-\d+': .*cannot be decoded"
    ):
        next(train_loader(data, run_of(), order_of(data, run_of()), [(0, 12)], 0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_outside_the_vocabulary_is_named(dataset: Dataset, run_of: RunOf, workers: int) -> None:
    fewer = replace(dataset, vocabulary=dataset.vocabulary[:2])  # as if the manifest and the shards were of two builds
    wanted = r"shard-\d+\.tar: sample \d at byte \d+: key 'class/picture-\d+': labels \[2\]: .* from 0 to 1"
    with pytest.raises(DataError, match=wanted):
        next(train_loader(fewer, run_of(workers), order_of(dataset, run_of()), [(0, 12)], 0, 1))
    with pytest.raises(DataError, match=wanted):
        list(heldout_loader(fewer, "heldout", run_of(workers), 0, 1))


def test_a_data_set_without_a_held_out_split_is_refused(dataset: Dataset, run_of: RunOf) -> None:
    without = replace(dataset, splits={"train": dataset.split("train")})
    with pytest.raises(InputError, match=r"has no split 'heldout', only train; .*"):
        heldout_loader(without, "heldout", run_of(), 0, 1)


LOADING = """
import sys, time
from configs.schema import Augment, Cluster, Data, Model, Run
from data_pipeline.manifest import open_dataset
from data_pipeline.order import Order
from data_pipeline.stream import train_loader
if __name__ == "__main__":
    data = open_dataset(sys.argv[1])
    run = Run(model=Model(resolution=32), data=Data(global_batch=12, workers=2), cluster=Cluster(device="cpu"))
    order = Order(data.split("train").counts, 0, 12, 5, 4)
    batches = train_loader(data, run, order, [(0, 12)], 0, 10**6)
    next(batches), next(batches)
    print("running", flush=True)
    time.sleep(600)
"""


def descendants(root: int) -> set[int]:
    """Process ids below `root`."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_do_not_outlive_a_killed_parent(dataset: Dataset, tmp_path: Path) -> None:
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, str(script), dataset.root], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "running\n"
    children = descendants(parent.pid)
    assert len(children) >= 3  # two workers and the server that forks them
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while left := {pid for pid in children if alive(pid)}:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
