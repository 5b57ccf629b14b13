"""Scores a run's newest checkpoint, one process per device: `python -m trainer.evaluation.evaluate_run RUN`.

No optimizer and no partitioning: each rank holds the whole network.
"""

import json
import sys
from pathlib import Path

import torch

from configs import resolve
from configs.errors import InputError
from data_pipeline.stream import heldout_loader, open_data
from models.attention import kept_biases
from trainer import cluster
from trainer.engine import network
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.examples import Examples
from trainer.state import checkpoint


def evaluate_run(folder: Path) -> dict[str, float]:
    """Evaluate the newest verified checkpoint of `folder` and write `evaluation.json` there.

    Raises:
        InputError: the folder has no checkpoint that verifies, or the data do not belong to it.
    """
    run = resolve.recorded(folder / "run.json")
    member = cluster.join(run)
    saved = checkpoint.newest(folder / "checkpoints", member)
    if saved is None:
        raise InputError(f"{folder}/checkpoints: no checkpoint that verifies; `coatnet train` writes them")
    dataset = open_data(run)
    if list(dataset.vocabulary) != saved.state["vocabulary"]:
        raise InputError(f"{dataset.root}: has other classes than the data {folder} was trained on")
    model = network.bare(run, dataset.classes, member.device)
    scores = {"step": float(saved.step)}
    for prefix in ("eval", "eval_ema") if run.optim.ema else ("eval",):
        checkpoint.load_parameters(saved, model, average=prefix == "eval_ema")
        model.eval()
        batches = heldout_loader(dataset, "heldout", run, member.rank, member.world)
        autocast = torch.autocast(member.device.type, torch.bfloat16, enabled=run.precision.dtype == "bf16")
        with torch.no_grad(), autocast, kept_biases(model):
            examples = Examples(run, dataset.classes)
            found = evaluate(model, batches, run, dataset, member, examples)
        scores |= {f"{prefix}/{name}": value for name, value in found.items()}
    examples.write(folder, saved.step, member)  # of the averaged weights where the run keeps them
    if member.first:
        (folder / "evaluation.json").write_text(json.dumps({**scores, "step": saved.step}, indent=2))
    cluster.leave()
    return scores


def main(arguments: list[str]) -> int:
    """Evaluate as one rank."""
    try:
        evaluate_run(Path(arguments[0]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 76
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
