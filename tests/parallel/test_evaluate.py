"""Scores over ranks: each held-out picture counts once, with more ranks than pictures too."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from configs import resolve
from configs.schema import Augment, Cluster, Data, Evaluate, Model, Optim, Run
from data_pipeline.augment import eval_view
from data_pipeline.building.build import Picture, write_dataset
from data_pipeline.decode import decode
from data_pipeline.prefetch import Fetched
from data_pipeline.stream import open_data
from tests.unit.data_pipeline.conftest import picture
from trainer.launch import free_port, launch

network = runpy.run_path(str(Path(__file__).parent / "evaluate_rank.py"))["network"]
CLASSES, WORLD = 7, 3


def labels(number: int) -> tuple[int, ...]:
    """Of picture `number`: none, one or several; class 6 is nobody's."""
    return tuple(k for k in range(CLASSES - 1) if number % 11 >> k & 1)


def run_over(folder: Path, pictures: list[Picture], several: bool) -> Run:
    """A run whose data set is made of `pictures`."""
    names = [f"class {k}" for k in range(CLASSES)]
    write_dataset(pictures, folder, names, "multi" if several else "single", {}, 6)
    return Run(
        model=Model(resolution=32),
        data=Data(path=str(folder), workers=0),
        augment=Augment(),
        optim=Optim(loss="sigmoid" if several else "softmax"),
        evaluate=Evaluate(micro_batch=4),
        cluster=Cluster(device="cpu"),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Many pictures of several labels, and a few of one."""
    folder = tmp_path_factory.mktemp("evaluate")
    many = [picture(number, labels(number)) for number in range(120)]
    few = [picture(number, (number % CLASSES,)) for number in range(12)]
    return [run_over(folder / "many", many, True), run_over(folder / "few", few, False)]


def stored(run: Run) -> tuple[Tensor, Tensor]:
    """Logits (N, K) of all held-out pictures and which classes they have, (N, K) bool, read one by one."""
    split = open_data(run).split("heldout")
    shards, wanted = Fetched(split, run.data).open(), torch.zeros(split.samples, CLASSES).bool()
    logits: list[Tensor] = []
    for shard, count in enumerate(split.counts.tolist()):
        for number in range(count):
            sample = shards.read(shard, number, CLASSES)
            wanted[len(logits), list(sample.labels)] = True
            pixels = eval_view(decode(sample.picture, 10**6), run.model.resolution, run.augment) / 255
            mean, std = (torch.tensor(value).view(3, 1, 1) for value in (run.augment.mean, run.augment.std))
            logits.append(network(((pixels - mean) / std)[None], CLASSES)[0])
    return torch.stack(logits), wanted


def expected(run: Run) -> dict[str, float]:
    """The scores by their definitions."""
    logits, wanted = stored(run)
    hits = wanted.gather(1, logits.argsort(1, descending=True))
    loss_of = F.binary_cross_entropy_with_logits if run.optim.loss == "sigmoid" else F.cross_entropy
    losses = loss_of(logits, wanted.float(), reduction="none").view(len(logits), -1).sum(1)
    assert hits[-1, 0] or run.optim.loss != "sigmoid", "the picture that fills up is to be one that would count"
    each = {"top1": hits[:, 0], "top5": hits[:, :5].any(1), "loss": losses}
    scores = {name: float(value.double().mean()) for name, value in each.items()} | {"samples": len(logits)}
    if run.optim.loss == "sigmoid":
        seen = np.flatnonzero(wanted.any(0).numpy())
        ranked = [average_precision_score(wanted[:, k].numpy(), logits[:, k].numpy()) for k in seen]
        scores["map"] = float(np.mean(ranked))
    return scores


def test_scores_are_those_of_every_picture_once(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "runs.json").write_text(json.dumps([resolve.to_json(run) for run in runs]))
    words = ["evaluate_rank", str(tmp_path / "runs.json"), str(tmp_path / "scores")]
    assert launch(words, WORLD, tmp_path / "logs", free_port(), True) == 0
    truth = [expected(run) for run in runs]
    assert truth[0]["samples"] > WORLD * runs[0].evaluate.micro_batch, "there are to be several passes"
    assert truth[0]["samples"] % WORLD, "the last batches are to be padded"
    assert truth[1]["samples"] < WORLD
    assert 0 < truth[0]["top1"] < truth[0]["top5"] < 1
    for rank in range(WORLD):
        for scores, wanted in zip(json.loads((tmp_path / f"scores.{rank}").read_text()), truth, strict=True):
            assert scores == pytest.approx(wanted, rel=1e-5)
