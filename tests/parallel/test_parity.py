"""Every layout does what one plain process does: pairwise over the matrix, with restarts, poisoned steps and teams.

The whole matrix is in test_parity_pipeline.py.
"""

import math
from dataclasses import astuple
from itertools import combinations
from typing import Any

import pytest

from tests.parallel import parity
from tests.parallel.parity import POISONED_AT, SHORT, Case, Cell

pytestmark = pytest.mark.timeout(900)  # the first test of it walks all cases

# Cells that others are compared with to the bit: the cover begins with them.
ZERO0, ZERO3 = Cell(1, 2, 0, "none", "fp32"), Cell(1, 2, 3, "none", "fp32")
PIPELINE0, PIPELINE2 = Cell(2, 1, 0, "none", "fp32"), Cell(2, 1, 2, "selective", "fp32")
# The same with other recomputation. Under a pipeline and ZeRO-2/3 a block's is inside that of its stage.
AGAIN = {
    Cell(1, 2, 0, "selective", "fp32"): ZERO0,
    Cell(1, 2, 3, "full", "fp32"): ZERO3,
    Cell(2, 1, 2, "full", "fp32"): PIPELINE2,
}
CELLS = parity.pairwise((ZERO0, ZERO3, PIPELINE0, PIPELINE2, *AGAIN))
RESTARTED = {f"{cell.name}-restarted": cell for cell in (ZERO0, ZERO3, PIPELINE2)}
POISONED = {f"{cell.name}-poisoned": cell for cell in (ZERO3, PIPELINE0, PIPELINE2)}
OTHERS: dict[str, Case] = {
    # A BatchNorm group over both replicas of a stage, and two groups in one pass.
    "team": {"zero": 1, "micro_batch": 2},
    "team-zero3-full": {"zero": 3, "micro_batch": 2, "recompute": "full"},
    "two-groups-pipeline": {"zero": 3, "micro_batch": 8, "recompute": "full", "pipeline": 2},
    # AdamW and its state in the host's memory.
    **{f"zero{zero}-cpu": {"zero": zero, "micro_batch": 4, "offload": "cpu"} for zero in (1, 2, 3)},
    "zero1-cpu-pipeline": {"zero": 1, "micro_batch": 4, "offload": "cpu", "pipeline": 2},
    "zero3-cpu-pipeline": {"zero": 3, "micro_batch": 4, "offload": "cpu", "pipeline": 2, "recompute": "full"},
}
# What a fault breaks, and nothing else: see `parity.measure` and the faults in parity_worker.
FAULTS: dict[str, tuple[Cell, set[str]]] = {
    "clip": (PIPELINE0, {"loss", "weights", "average", "statistics", "logits"}),
    "unmarked": (PIPELINE2, {"norm", "loss", "weights", "average", "statistics", "logits"}),  # a part of the shims
    "norm": (PIPELINE0, {"norm", "loss", "weights", "average", "statistics", "logits"}),
    "statistics": (ZERO0, {"statistics", "logits"}),
    "replica": (ZERO3, {"replicas"}),
    "average": (ZERO3, {"average", "statistics", "logits"}),
}


def cases() -> dict[int, dict[str, Case]]:
    """All cases by world size."""
    short = {"size": 32, "steps": SHORT, "reference": "short"}
    shared = {"zero": 3, "micro_batch": 2, "shard_group": 2, "recompute": "full", "restart_at": 5}
    found: dict[int, dict[str, Case]] = {2: {name: {**short, **case} for name, case in OTHERS.items()}}
    for cell in CELLS:
        found.setdefault(cell.world, {})[cell.name] = {**cell.case, "note_after": SHORT}
    for name, cell in RESTARTED.items():
        found[2][name] = {**cell.case, **short, "restart_at": 5}
    for name, cell in POISONED.items():
        found[2][name] = {**cell.case, **short, "poisoned_at": POISONED_AT, "restart_at": 6, "reference": "poisoned"}
    for fault, (cell, _) in FAULTS.items():
        found[2][fault] = {**cell.case, **short, "fault": fault}
    found[4]["shard-group"] = {**short, **shared}
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the ranks of each case saw, and the plain processes."""
    return parity.answers(cases(), tmp_path_factory.mktemp("parity"))


Answers = dict[str, list[dict[str, Any]]]


def test_every_pair_of_values_is_in_the_cover() -> None:
    wanted = {
        pair
        for a in parity.MATRIX
        for pair in combinations(zip(("pipeline", "data", "zero", "recompute", "dtype"), astuple(a), strict=True), 2)
    }
    values = {(name, value) for cell in parity.MATRIX for name, value in vars(cell).items()}
    assert len(values) == 3 + 2 + 4 + 3 + 2
    # Every two values of different factors are together somewhere: what is not allowed takes three of them.
    assert len(wanted) == sum(1 for a, b in combinations(values, 2) if a[0] != b[0])
    covered = set().union(*(parity.pairs(cell) for cell in CELLS))
    assert covered == wanted
    assert set(CELLS) <= set(parity.MATRIX)


def test_the_matrix_is_what_a_run_may_ask_for() -> None:
    assert len(parity.MATRIX) == 3 * 2 * 4 * 3 * 2 - 2 * 2 * 2 * 1 * 2
    assert {cell.world for cell in parity.MATRIX} == {1, 2, 4, 8}


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_problem_is_learned_and_clipped(kind: str, answers: Answers) -> None:
    (plain,) = answers[kind]
    assert sum(plain["losses"][-3:]) / 3 < 0.85 * plain["losses"][0]
    assert min(plain["norms"]) > 2 * parity.CLIP
    # Averaged and raw weights are far enough apart for their comparisons to mean something.
    assert parity.largest(parity.flat(plain["raw"]), parity.flat(plain["averaged"])) > 0.01


def test_rounding_stays_rounding(answers: Answers) -> None:
    assert 0 < parity.largest(answers["fp32"][0]["losses"], answers["shaken"][0]["losses"]) < 2e-6


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_layout_does_what_one_plain_process_does(cell: Cell, answers: Answers) -> None:
    found = parity.measure(answers[cell.name], answers[cell.dtype][0])
    assert parity.broken(found, cell.dtype) == [], found
    if cell.dtype == "bf16":
        assert found["loss"] > 1e-4  # other arithmetic


def test_a_second_copy_of_the_weights_in_a_shard_group_is_the_same(answers: Answers) -> None:
    found = parity.measure(answers["shard-group"], answers["short"][0])
    assert parity.broken(found, "fp32", short=True) == [], found


@pytest.mark.parametrize("name", OTHERS)
def test_groups_over_replicas_several_in_a_pass_and_state_elsewhere(name: str, answers: Answers) -> None:
    found = parity.measure(answers[name], answers[OTHERS[name].get("reference", "short")][0])
    assert parity.broken(found, "fp32", short=True) == [], found


@pytest.mark.parametrize(("cell", "base"), AGAIN.items(), ids=lambda cell: cell.name)
def test_recomputation_changes_nothing(cell: Cell, base: Cell, answers: Answers) -> None:
    for again, without in zip(answers[cell.name], answers[base.name], strict=True):
        assert {key: again[key] for key in parity.EXACT} == {key: without[key] for key in parity.EXACT}


@pytest.mark.parametrize("name", RESTARTED)
def test_restart_is_bitwise(name: str, answers: Answers) -> None:
    for restarted, through in zip(answers[name], answers[RESTARTED[name].name], strict=True):
        assert {key: restarted[key] for key in parity.AFTER_SHORT} == through["noted"]


@pytest.mark.parametrize("name", POISONED)
def test_step_without_a_finite_gradient_changes_nothing(name: str, answers: Answers) -> None:
    expected = answers["poisoned"][0]
    for rank in answers[name]:
        assert not math.isfinite(rank["norms"][POISONED_AT])
        assert not math.isfinite(rank["losses"][POISONED_AT])
        rank["losses"][POISONED_AT] = expected["losses"][POISONED_AT] = 0.0
    found = parity.measure(answers[name], expected)
    assert parity.broken(found, "fp32", short=True) == [], found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_its_bounds(fault: str, answers: Answers) -> None:
    _, expected = FAULTS[fault]
    found = parity.measure(answers[fault], answers["short"][0])
    assert set(parity.broken(found, "fp32", short=True)) == expected, found


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.zero and cell.data > 1], ids=lambda cell: cell.name)
def test_each_rank_owns_its_share_of_a_stage(cell: Cell, answers: Answers) -> None:
    for stage in range(cell.pipeline):
        of_stage = [rank for rank in answers[cell.name] if rank["stage"] == stage]
        held = [sum(count for *_, count in rank["pieces"]) for rank in of_stage]
        assert len(held) == cell.data
        assert max(held) - min(held) <= 0.01 * sum(held)
