"""One rank of a run that only loads: it reads its slices of every global batch and says what it got, until killed."""

import hashlib
import json
from multiprocessing.connection import Connection

import torch

from configs.schema import Run
from data_pipeline import mixture
from data_pipeline.batch import Batch
from data_pipeline.stream import open_data, train_loader

MICRO = 2  # samples of a micro-batch: small, so that kills fall within a step

Record = tuple[int, str, str]  # global index, key, sha256 over pixels, label, seed and mixing


def records(batch: Batch) -> list[Record]:
    """What a micro-batch holds, sample by sample."""
    found = []
    for slot, key in enumerate(batch.keys):
        digest = hashlib.sha256(batch.images_BCHW[slot].contiguous().numpy().tobytes())
        for tensor in (batch.labels, batch.seeds_B, batch.kept_B, batch.boxes_B4):
            value = "" if tensor is None else tensor[slot].reshape(-1).tolist()
            # Labels are padded to the longest of the micro-batch, whose size is the layout's.
            digest.update(repr([number for number in value if number != -1]).encode())
        found.append((int(batch.indices_B[slot]), key, digest.hexdigest()))
    return found


def load(run: Run, state: str, rank: int, world: int, steps: int, told: Connection) -> None:
    """Send the records of each micro-batch of `steps` steps from the cursor `state` on, a step for each word of `told`.

    The other end gives the word when every rank has delivered the step before, as a collective would.
    """
    torch.set_num_threads(1)
    dataset = open_data(run)
    order, consumed = mixture.resume(json.loads(state), dataset.split("train"))
    share = run.data.global_batch // world
    slices = [(first, first + MICRO) for first in range(rank * share, (rank + 1) * share, MICRO)]
    batches = iter(train_loader(dataset, run, order, slices, consumed, steps))
    for _ in range(steps):
        for _ in slices:
            told.send(records(next(batches)))
        told.recv()
