"""One rank of the mean average precision's test: scores its share of fixed samples and writes the result.

python -m map_rank OUT     (RANK, WORLD_SIZE, MASTER_* set; the folder on PYTHONPATH)
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.evaluation.average_precision import average_precisions

SAMPLES, CLASSES = 103, 150


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, and labels; some classes have no sample."""
    generator = torch.Generator().manual_seed(4)
    scores = (torch.randn(SAMPLES, CLASSES, generator=generator) * 3).round() / 3
    positive = torch.rand(SAMPLES, CLASSES, generator=generator) < torch.linspace(0, 0.3, CLASSES)
    return scores, positive


def main(out: str) -> None:
    """Every rank takes another number of samples, the last perhaps none."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    cuts = [SAMPLES * k * k // (world * world) for k in range(world + 1)]
    share = slice(cuts[rank], cuts[rank + 1])
    scores, positive = samples()
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    Path(f"{out}.{rank}").write_text(json.dumps(average_precisions(scores[share], positive[share], group).tolist()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
