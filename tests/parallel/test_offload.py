"""State on a disk: right updates, restarts and averages on real ranks; CoAtNet-5 at its real size in little memory.

Slow, because DeepSpeed's transfers are compiled first. State in the host's memory is in test_parity.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.schema import Parallel, Run
from tests.parallel import offload, parity
from trainer.engine import disk

WIDE = {"size": 32, "steps": parity.SHORT, "micro_batch": 4, "model": "parity-wide", "reference": "wide", "zero": 3}
STILL = {"reference": "wide-still", "drop": 0.0}  # autograd goes another way where no branch is scaled
DISK = {**WIDE, "offload": "nvme", "piece": 600_000}  # several parts of the state, so that they take turns
CASES: dict[int, dict[str, parity.Case]] = {
    1: {
        "one": DISK,
        "one-full": {**DISK, **STILL, "recompute": "full"},
        "one-bf16": {**DISK, "dtype": "bf16"},
        "one-memory-bf16": {**WIDE, "dtype": "bf16"},
        "aliased": {**DISK, **STILL, "recompute": "full", "fault": "aliased"},
    },
    2: {
        "two": {**DISK, "recompute": "full"},
        "two-restarted": {**DISK, "recompute": "full", "restart_at": 5},
        "pipeline": {**DISK, "recompute": "full", "pipeline": 2},
        "swapped": {**DISK, "fault": "swapped"},
    },
}
Answers = dict[str, list[dict[str, Any]]]


def compiled(folder: Path) -> None:
    """Skip, loudly, where DeepSpeed's transfers cannot be compiled or the folder takes no direct I/O."""
    run = Run(parallel=Parallel(offload="nvme", offload_path=str(folder)))
    try:
        disk.check(run, 0)
        disk.prepare(run)
    except InputError as error:
        pytest.skip(f"NOT TESTED, state on a disk: {error}")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("offload")
    compiled(folder)
    return parity.answers(CASES, folder)


def close(found: dict[str, float]) -> bool:
    """Within the bounds of fp32. The norm may be a rounding further away, whose sum goes over larger weights here."""
    return set(parity.broken(found, "fp32", short=True)) <= {"norm"} and found["norm"] < 2e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["one", "one-full", "two", "two-restarted", "pipeline"])
def test_updates_on_a_disk_are_those_of_one_plain_process(name: str, answers: Answers) -> None:
    case = {**CASES[1], **CASES[2]}[name]
    found = parity.measure(answers[name], answers[case["reference"]][0])
    assert close(found), found


@pytest.mark.slow
def test_a_restart_is_bitwise(answers: Answers) -> None:
    for restarted, through in zip(answers["two-restarted"], answers["two"], strict=True):
        assert {key: restarted[key] for key in parity.EXACT} == {key: through[key] for key in parity.EXACT}


@pytest.mark.slow
def test_bf16_is_as_in_memory(answers: Answers) -> None:
    on_disk, in_memory = answers["one-bf16"][0], answers["one-memory-bf16"][0]
    assert parity.largest(on_disk["losses"], in_memory["losses"]) < 1e-6
    assert parity.largest(on_disk["norms"], in_memory["norms"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["swapped", "aliased"])
def test_deepspeeds_own_way_is_wrong(fault: str, answers: Answers) -> None:
    """Why `deepspeed_shims.keep_gradients` and `own_weights` are there; where this fails, DeepSpeed was mended."""
    case = {**CASES[1], **CASES[2]}[fault]
    found = parity.measure(answers[fault], answers[case["reference"]][0])
    assert found["weights"] > 0.05, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_coatnet5_trains_with_its_state_on_a_disk(tmp_path: Path) -> None:
    compiled(tmp_path)
    real = offload.trained(f"{offload.REAL} {offload.ON_DISK}", tmp_path / "real")
    assert real.peak < offload.LIMIT
    assert real.disk > 4 * 4 * 680_000_000
    assert all(map(math.isfinite, real.losses))
    small, memory = (
        offload.trained(f"{offload.SMALL} {where}", tmp_path / where.split()[-1])
        for where in (offload.ON_DISK, offload.IN_MEMORY)
    )
    assert parity.largest(small.losses, memory.losses) < 1e-5
    assert parity.largest(small.norms, memory.norms) < 1e-4 * max(memory.norms)
