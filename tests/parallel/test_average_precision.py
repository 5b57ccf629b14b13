"""Average precision: scikit-learn's value, whatever the number of ranks."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from trainer.evaluation.average_precision import average_precision
from trainer.launch import free_port, launch

samples = runpy.run_path(str(Path(__file__).parent / "map_rank.py"))["samples"]


def test_one_class_equals_scikit_learn() -> None:
    scores, positive = samples()
    for column in positive.any(0).nonzero().flatten().tolist():
        expected = average_precision_score(positive[:, column].numpy(), scores[:, column].numpy())
        assert average_precision(scores[:, column], positive[:, column]) == pytest.approx(expected, abs=1e-12)


def test_perfect_and_worst_ranking() -> None:
    positive = torch.tensor([True, True, False, False])
    assert average_precision(torch.tensor([4.0, 3.0, 2.0, 1.0]), positive) == 1.0
    assert average_precision(torch.tensor([1.0, 2.0, 3.0, 4.0]), positive) == pytest.approx((1 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_class_over_ranks(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "map"
    assert launch(["map_rank", str(out)], world, tmp_path / "logs", free_port(), True) == 0
    scores, positive = samples()
    seen = positive.any(0).numpy()
    assert 0 < seen.sum() < len(seen)
    for rank in range(world):
        found = np.array(json.loads((tmp_path / f"map.{rank}").read_text()))
        assert (np.isnan(found) == ~seen).all()
        for column in np.flatnonzero(seen):
            expected = average_precision_score(positive[:, column].numpy(), scores[:, column].numpy())
            assert found[column] == pytest.approx(expected, abs=1e-12)
