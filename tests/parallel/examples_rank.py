"""One rank of the test of examples: takes its share of made-up logits and writes what all ranks have.

python -m examples_rank OUT     (RANK, WORLD_SIZE, MASTER_* set; the folder on PYTHONPATH)
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from configs import resolve
from data_pipeline.batch import Batch
from trainer.cluster import Member
from trainer.evaluation.examples import Examples

SAMPLES, CLASSES, SIZE = 103, 9, 8


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; the last class has no sample."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(SAMPLES, CLASSES, generator=generator) * 3
    return logits, torch.randint(0, CLASSES - 1, (SAMPLES,), generator=generator)


def main(out: str) -> None:
    """Every rank takes a contiguous share, its last batch filled up with rows that do not count."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    member = Member(rank, world, 0, torch.device("cpu"), group)
    logits, labels = samples()
    chunk = -(-SAMPLES // world)
    examples = Examples(resolve.load("demo-digits"), CLASSES)
    for first in range(rank * chunk, (rank + 1) * chunk, SIZE):
        wished = torch.arange(first, first + SIZE)
        rows = wished.clamp(max=SAMPLES - 1)
        batch = Batch(
            images_BCHW=torch.zeros(SIZE, 3, 1, 1, dtype=torch.uint8), labels=labels[rows], seeds_B=rows,
            indices_B=rows, valid_B=(wished < SAMPLES) & (wished < (rank + 1) * chunk),
            keys=[f"key-{row}" for row in rows.tolist()],
        )  # fmt: skip
        examples.take(batch, logits[rows], torch.nn.functional.one_hot(labels[rows], CLASSES))
    Path(f"{out}.{rank}").write_text(json.dumps(examples.result(member)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
