"""What an evaluation shows of pictures and classes: by a plain count, whatever the number of ranks."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.examples import SHOWN, SPREAD
from trainer.launch import free_port, launch

rank_file = runpy.run_path(str(Path(__file__).parent / "examples_rank.py"))
CLASSES: int = rank_file["CLASSES"]


def test_pictures_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, world = tmp_path / "examples", 3
    assert launch(["examples_rank", str(out)], world, tmp_path / "logs", free_port(), True) == 0
    found = [json.loads((tmp_path / f"examples.{rank}").read_text()) for rank in range(world)]
    assert all(one == found[0] for one in found)
    logits, labels = rank_file["samples"]()
    guesses, chances = logits.argmax(1), logits.softmax(1)
    classes: list[tuple[float, int, int]] = []
    for number in range(CLASSES):
        own = labels == number
        if own.any():
            classes.append((float((guesses == number)[own].double().mean()), number, int(own.sum())))
    assert found[0]["classes"] == CLASSES - 1
    assert found[0]["worst"] == [[number, count, share] for share, number, count in sorted(classes)]
    check_pictures(found[0], guesses.tolist(), labels.tolist(), chances)


def check_pictures(found: dict[str, Any], guesses: list[int], labels: list[int], chances: Any) -> None:
    drawn = sorted(range(len(labels)), key=lambda row: row * SPREAD % 2**32)[:SHOWN]
    wrong = [row for row in range(len(labels)) if guesses[row] != labels[row]]
    wrong = sorted(wrong, key=lambda row: -float(chances[row].max()))[:SHOWN]
    assert [place["index"] for place in found["drawn"]] == drawn
    assert [place["index"] for place in found["wrong"]] == wrong
    for place in found["drawn"] + found["wrong"]:
        row = place["index"]
        assert (place["key"], place["labels"]) == (f"key-{row}", [labels[row]])
        assert place["right"] == (guesses[row] == labels[row])
        assert [number for number, _ in place["top"]] == chances[row].argsort(descending=True)[:3].tolist()
        assert place["top"][0][1] == pytest.approx(float(chances[row].max()))
