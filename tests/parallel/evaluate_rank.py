"""One rank of the evaluation's test: scores its share of the held-out pictures of each run and writes what it got.

python -m evaluate_rank RUNS OUT     (RANK, WORLD_SIZE, MASTER_* set; the folder on PYTHONPATH)
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from configs import resolve
from data_pipeline.stream import heldout_loader, open_data
from trainer import cluster
from trainer.evaluation.evaluate import evaluate


def network(images_BCHW: Tensor, classes: int) -> Tensor:
    """Logits (B, K) of a fixed linear map, whose rounding does not depend on the batch."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(classes, *images_BCHW.shape[1:], dtype=torch.float64, generator=generator)
    return torch.stack([(image.double() * weights).mean((1, 2, 3)) for image in images_BCHW]).mul(100).float()


def main(runs: str, out: str) -> None:
    """Score every run of the JSON list in the file `runs`."""
    scores, member = [], None
    for text in json.loads(Path(runs).read_text()):
        run = resolve.from_json(text)
        member = member or cluster.join(run)
        dataset = open_data(run)
        batches = heldout_loader(dataset, "heldout", run, member.replica, member.replicas)
        scores.append(evaluate(lambda x, k=dataset.classes: network(x, k), batches, run, dataset, member))  # type: ignore[misc]
    assert member is not None
    Path(f"{out}.{member.rank}").write_text(json.dumps(scores))
    cluster.leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
