"""Every ZeRO stage, with and without recomputation, accumulation and restart, does what one plain process does."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trainer.launch import free_port, launch

CASES: dict[str, dict[str, Any]] = {
    "zero0": {"zero": 0},
    "zero0-full": {"zero": 0, "recompute": "full"},
    "zero0-selective": {"zero": 0, "recompute": "selective"},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "zero3-full": {"zero": 3, "recompute": "full"},
    "zero3-selective": {"zero": 3, "recompute": "selective"},
    "zero1-group-over-two-ranks": {"zero": 1, "micro_batch": 4},
    "zero3-full-group-over-two-ranks": {"zero": 3, "recompute": "full", "micro_batch": 4},
    "zero0-group-over-two-ranks": {"zero": 0, "micro_batch": 4},
    "zero2-group-over-two-ranks": {"zero": 2, "micro_batch": 4},
    "zero0-restarted": {"zero": 0, "restart_at": 7},
    "zero1-restarted": {"zero": 1, "restart_at": 7},
    "zero2-restarted": {"zero": 2, "restart_at": 7},
    "zero3-restarted": {"zero": 3, "restart_at": 7},
    "zero0-poisoned": {"zero": 0, "poisoned_at": 4, "restart_at": 7},
    "zero2-poisoned": {"zero": 2, "poisoned_at": 4, "restart_at": 7},
    "zero3-poisoned": {"zero": 3, "recompute": "full", "poisoned_at": 4, "restart_at": 7},
    # last: DeepSpeed remembers for the whole process that autocast was once switched on
    "zero1-bf16": {"zero": 1, "dtype": "bf16"},
    "zero3-selective-bf16": {"zero": 3, "dtype": "bf16", "recompute": "selective"},
    "zero3-full-bf16": {"zero": 3, "dtype": "bf16", "recompute": "full"},
}
Answer = dict[str, dict[str, Any]]


def run(cases: dict[str, dict[str, Any]], world: int, folder: Path, patch: pytest.MonkeyPatch) -> list[Answer]:
    """What each rank saw."""
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    patch.setenv("OMP_NUM_THREADS", "1")
    for name, case in cases.items():
        if "restart_at" in case:
            case["folder"] = str(folder / name)
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = ["parity_worker", str(folder / "cases.json"), str(folder / "out")]
    assert launch(arguments, world, folder / "logs", free_port(), True) == 0
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    with pytest.MonkeyPatch.context() as patch:
        return run(CASES, 2, tmp_path_factory.mktemp("two"), patch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        cases = {
            "plain": {"plain": True, "zero": 0},
            "poisoned": {"plain": True, "zero": 0, "poisoned_at": 4},
            "one-rank": {"zero": 3},
        }
        found = run(cases, 1, tmp_path_factory.mktemp("one"), patch)[0]
    assert found["plain"]["losses"] == pytest.approx(found["one-rank"]["losses"], abs=1e-4)
    return {**found["plain"], "poisoned": found["poisoned"]}


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_reference_learns(reference: dict[str, Any]) -> None:
    first, last = reference["losses"][0], sum(reference["losses"][-3:]) / 3
    assert last < 0.9 * first


PLAIN = [name for name in CASES if "bf16" not in name and "poisoned" not in name]


@pytest.mark.parametrize("name", PLAIN)
def test_losses_equal_one_plain_process(name: str, answers: list[Answer], reference: dict[str, Any]) -> None:
    for rank in answers:
        # Rounding flips the choice of a max-pool sooner or later; until then the losses are equal to the last digits.
        assert largest(rank[name]["losses"][:12], reference["losses"][:12]) < 1e-5
        assert largest(rank[name]["losses"], reference["losses"]) < 1e-4
        assert rank[name]["norms"][0] == pytest.approx(reference["norms"][0], rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "bf16" in name])
def test_bf16_stays_near(name: str, answers: list[Answer], reference: dict[str, Any]) -> None:
    mine, exact = answers[0][name]["losses"], reference["losses"]
    assert 0 < largest(mine[:6], exact[:6]) < 1e-2  # other arithmetic; AdamW then carries the paths apart
    assert sum(mine[-3:]) / 3 < 0.9 * mine[0]
    assert answers[0][name]["norms"][0] == pytest.approx(reference["norms"][0], rel=0.02)


@pytest.mark.parametrize("name", [name for name in CASES if "poisoned" not in name])
def test_batchnorm_statistics(name: str, answers: list[Answer], reference: dict[str, Any]) -> None:
    mine, other = answers[0][name]["buffers"], answers[1][name]["buffers"]
    assert mine == other  # on all ranks to the bit
    if "bf16" in name:
        return
    for buffer, values in reference["buffers"].items():
        # The norm behind the stem's first convolution takes that convolution's bias out again: the bias has no
        # gradient, and AdamW moves it by the sign of rounding noise, at most lr a step. The mean follows it.
        loose = 20 * 1e-3 if buffer == "blocks.s0.0.norm.running_mean" else 2e-4
        assert mine[buffer] == pytest.approx(values, rel=1e-3, abs=loose), buffer


@pytest.mark.parametrize("name", PLAIN)
def test_averaged_weights_equal_a_gathered_reference(
    name: str, answers: list[Answer], reference: dict[str, Any]
) -> None:
    for parameter, expected in reference["average"].items():
        found = sum(rank[name]["average"].get(parameter, 0.0) for rank in answers)
        assert found == pytest.approx(expected, rel=1e-2, abs=2e-2), parameter
    for rank in answers:
        for got, wanted in ((rank[name]["raw"], reference["raw"]), (rank[name]["averaged"], reference["averaged"])):
            for row, expected_row in zip(got, wanted, strict=True):
                assert row == pytest.approx(expected_row, abs=5e-3)
    assert answers[0][name]["average_buffers"] == answers[1][name]["average_buffers"]
    # Averaged and raw weights are far enough apart for the comparisons above to mean something.
    apart = [largest(a, b) for a, b in zip(reference["raw"], reference["averaged"], strict=True)]
    assert max(apart) > 0.05


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("stage", [0, 3])
def test_recomputation_changes_nothing(stage: int, kind: str, answers: list[Answer]) -> None:
    without, again = answers[0][f"zero{stage}"], answers[0][f"zero{stage}-{kind}"]
    assert again["losses"] == without["losses"]
    assert again["buffers"] == without["buffers"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_restart_is_bitwise(stage: int, answers: list[Answer]) -> None:
    for rank in answers:
        through, restarted = rank[f"zero{stage}"], rank[f"zero{stage}-restarted"]
        assert restarted["losses"] == through["losses"]
        assert restarted["norms"] == through["norms"]
        assert restarted["buffers"] == through["buffers"]
        assert restarted["average"] == through["average"]
        assert restarted["average_buffers"] == through["average_buffers"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_step_without_a_finite_gradient_changes_nothing(
    stage: int, answers: list[Answer], reference: dict[str, Any]
) -> None:
    expected = reference["poisoned"]
    for rank in answers:
        found = rank[f"zero{stage}-poisoned"]
        assert math.isinf(found["norms"][4]) or math.isnan(found["norms"][4])
        assert largest(found["losses"][5:14], expected["losses"][5:14]) < 1e-5
        for buffer, values in expected["buffers"].items():
            loose = 20 * 1e-3 if buffer == "blocks.s0.0.norm.running_mean" else 2e-3
            assert found["buffers"][buffer] == pytest.approx(values, rel=1e-2, abs=loose), buffer


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_rank_owns_half(stage: int, answers: list[Answer]) -> None:
    held = [rank[f"zero{stage}"]["held"] for rank in answers]
    assert abs(held[0] - held[1]) <= 0.01 * sum(held)
