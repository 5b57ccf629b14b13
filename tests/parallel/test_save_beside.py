"""A save that is copied while training goes on has nothing of what came after it, under every engine."""

import json

import pytest

from tests.parallel import pool
from tests.parallel.save_worker import LATE

CASES = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "evaluation": {"zero": 1, "evaluates": True},
    "pipeline": {"zero": 1, "pipeline": 2, "balance": "parameters"},
}
Answer = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What both ranks saw."""
    folder = tmp_path_factory.mktemp("save")
    (folder / "cases.json").write_text(json.dumps(CASES))
    pool.run([pool.Job("save_worker", (str(folder / "cases.json"), str(folder / "out")), 2, str(folder))], folder)
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_a_late_copy_is_of_its_own_step(name: str, answers: list[Answer]) -> None:
    for answer in answers:
        found = answer[name]
        assert found["problem"] == ""
        assert found["beside"], "the passes waited for the copy"
        assert found["changed"], "nothing came after the save"
        assert found["same"]
        stall = found["stall"]
        assert isinstance(stall, float)
        assert stall > LATE / 2, "nothing waited for the copy"
