"""A checkpoint of any layout continued in any other: the same losses, samples, averages and running statistics."""

from pathlib import Path

import pytest

from tests.parallel.elastic import BOUND, LAYOUTS, Found, matrix

# Shares of a tensor's largest element at the end, several times what was seen (tests/records/elastic.json).
REST = {"weights": 1e-5, "average": 1e-5, "moments": 1e-3, "statistics": 1e-5, "score": 1e-4}


def broken(found: list[Found]) -> list[str]:
    """What does not hold, in words."""
    wrong = []
    for cell in found:
        said = [f"loss {cell.loss}"] if not cell.loss <= BOUND else []
        said += [f"{name} {getattr(cell, name)}" for name, bound in REST.items() if not getattr(cell, name) <= bound]
        said += [] if cell.samples else ["other samples"]
        said += ["not bitwise"] if cell.source == cell.to and not cell.bitwise else []
        wrong += [f"{cell.source} to {cell.to}: {text}" for text in [*said, *cell.wrong]]
    return wrong


def test_two_ranks_go_on_as_replicas_or_as_stages(tmp_path: Path) -> None:
    found = matrix(((1, 2, 3), (2, 1, 1)), tmp_path, one_pool=True)
    assert len(found) == 4
    assert broken(found) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_layout_goes_on_in_every_layout(tmp_path: Path) -> None:
    found = matrix(LAYOUTS, tmp_path)
    assert len(found) == 36
    assert broken(found) == []
