"""The made-up data set: the real stream over it, the same batches at any layout, no files, true size."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.errors import InputError
from configs.schema import Augment, Cluster, Data, Evaluate, Model, Run
from data_pipeline.manifest import Dataset
from data_pipeline.order import Order
from data_pipeline.stream import Batch, heldout_loader, open_data, train_loader
from data_pipeline.synthetic import POOL


def run_of(workers: int = 0, classes: int = 50, size: int = 32, batch: int = 96) -> Run:
    return Run(
        seed=5,
        model=Model(resolution=size),
        data=Data(path="nowhere", synthetic=True, synthetic_classes=classes, global_batch=batch, workers=workers),
        augment=Augment(randaugment_layers=2, randaugment_magnitude=15, mixup_alpha=0.8),
        evaluate=Evaluate(micro_batch=512),
        cluster=Cluster(device="cpu"),
    )


def order_of(dataset: Dataset, run: Run) -> Order:
    return Order(dataset.split("train").counts, run.seed, run.data.global_batch, run.data.lanes, run.data.piece)


def batches(run: Run, slices: list[tuple[int, int]], steps: int = 3) -> list[Batch]:
    dataset = open_data(run)
    return list(train_loader(dataset, run, order_of(dataset, run), slices, 0, steps))


def test_its_facts() -> None:
    dataset = open_data(run_of(classes=1000))
    assert (dataset.classes, dataset.label_kind, dataset.synthetic) == (1000, "single", True)
    assert {name: split.samples for name, split in dataset.splits.items()} == {"train": 1_280_000, "heldout": 10_000}
    assert dataset.split("train").counts.sum() == 1_280_000
    assert dataset.label_counts == (1280,) * 1000
    assert len(set(dataset.vocabulary)) == 1000
    identities = [open_data(run_of(classes=k)).split(s).fingerprint for k in (1000, 999) for s in ("train", "heldout")]
    assert len(set(identities)) == 4


def test_a_run_on_files_opens_files() -> None:
    run = run_of()
    with pytest.raises(InputError, match=r"data\.path = 'nowhere': no such folder"):
        open_data(replace(run, data=replace(run.data, synthetic=False)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_position_alone(workers: int) -> None:
    whole = batches(run_of(), [(0, 96)])
    parts = batches(run_of(workers), [(0, 32), (32, 96)])
    for step, batch in enumerate(whole):
        first, second = parts[2 * step : 2 * step + 2]
        for name in ("images_BCHW", "labels", "seeds_B", "indices_B", "valid_B", "kept_B"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(first, name), getattr(second, name)]))
        assert batch.keys == first.keys + second.keys
    assert whole[0].images_BCHW.shape == (96, 3, 32, 32)
    assert whole[0].images_BCHW.dtype == torch.uint8
    assert whole[0].labels.shape == (96,)
    assert len(set(whole[0].keys + whole[1].keys)) == 192
    assert not torch.equal(whole[0].labels, whole[1].labels)


def test_pictures_are_noise_of_a_small_pool_and_labels_cover_all_classes() -> None:
    read = batches(run_of(), [(0, 96)], steps=20)
    pictures = {image.numpy().tobytes() for batch in read for image in batch.images_BCHW}
    assert len(pictures) == POOL
    assert abs(float(read[0].images_BCHW.float().mean()) - 127.5) < 2
    assert set(torch.cat([batch.labels for batch in read]).tolist()) == set(range(50))


def test_held_out_samples_come_once() -> None:
    run = run_of()
    ranks = [list(heldout_loader(open_data(run), "heldout", run, rank, 3)) for rank in range(3)]
    assert len({len(found) for found in ranks}) == 1
    seen = torch.cat([batch.indices_B[batch.valid_B] for found in ranks for batch in found])
    assert np.array_equal(np.sort(seen.numpy()), np.arange(10_000))


def test_reading_costs_little_beside_decoding(dataset: Dataset) -> None:
    noise = run_of(size=64)
    real = replace(noise, data=replace(noise.data, synthetic=False, path=str(dataset.root)))
    spent = {}
    for run in (noise, real, noise, real):  # the second round counts: imports and caches are warm
        data = open_data(run)
        began = time.process_time()
        list(train_loader(data, run, order_of(data, run), [(0, 96)], 0, 4))
        spent[run.data.synthetic] = time.process_time() - began
    assert spent[True] < spent[False] / 2
