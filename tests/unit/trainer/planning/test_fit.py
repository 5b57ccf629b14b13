"""The memory estimate, and the refusal that comes from it. tests/parallel/test_held_bytes.py measures real ranks."""

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from models import spec
from models.activations import Dtype, Recompute, activations, peak
from trainer.plan import Layout, layout
from trainer.planning.fit import FIXED, Memory, estimate, require_elsewhere, require_fit
from trainer.stages import partition
from trainer.stages.schedule import in_flight


def asked(run: Run, device: str = "cpu", **parallel: Any) -> Run:
    return replace(
        run,
        parallel=replace(run.parallel, **parallel),
        cluster=replace(run.cluster, device=device),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_those_of_the_micro_batch(recompute: Recompute, dtype: Dtype) -> None:
    # That a real pass keeps as many is held by tests/numerics/test_saved_bytes.py.
    run = resolve.load("coatnet0-in1k-224")
    run = replace(
        run,
        parallel=replace(run.parallel, recompute=recompute, micro_batch=128),
        precision=replace(run.precision, dtype=dtype),
        cluster=replace(run.cluster, device="cpu"),
    )
    blocks = activations(
        spec.get("coatnet0"), 224, batch=128, dtype=dtype, recompute=recompute, attention="explicit", classes=10
    )
    # The stem keeps a copy of the pictures in bf16 beside the pictures, which are there until the pass is over.
    pictures = 4 * 128 * 3 * 224 * 224 if dtype == "bf16" and recompute != "full" else 0
    loss = 8 * 128 * 10  # the targets, and what the loss takes the logarithm of
    loaded = (4096 // 8) * 3 * 224 * 224  # a rank's pictures of a step, in bytes
    assert estimate(run, layout(run, 8), 10).activations == peak(blocks) + pictures + loss + loaded


def test_states_follow_the_stage() -> None:
    run = resolve.load("coatnet5-jft300m-224")
    parameters = 688e6
    states: dict[Any, float] = {}
    for stage in (0, 1, 2, 3):
        staged = replace(run, parallel=replace(run.parallel, zero=stage))
        states[stage] = estimate(staged, layout(staged, 64), 1000).states / parameters
    assert states[0] == pytest.approx(16, rel=0.02)
    assert states[1] == pytest.approx(8 + 12 / 64, rel=0.02)
    # Of weights that reach into a rank's piece ZeRO-2 keeps the whole gradient: at most two more of the largest in each
    # of the optimizer's groups.
    assert 4 + 16 / 64 < states[2] < 4 + 16 / 64 + 4 * 2 * 4 * 2048**2 / parameters
    assert states[3] == pytest.approx(20 / 64, rel=0.02)


def test_offload_to_the_host_moves_states_only_where_the_device_has_memory_of_its_own() -> None:
    run = resolve.load("coatnet5-jft300m-224")
    parameters = 4 * 688e6  # bytes
    found: dict[tuple[str, str, int], Memory] = {}
    for device, offload, zero in product(("cpu", "cuda"), ("none", "cpu"), (1, 2, 3)):
        changed = asked(run, device, offload=offload, zero=zero)
        found[device, offload, zero] = estimate(changed, layout(changed, 64), 1000)
    for (device, offload, zero), memory in found.items():
        alone = found[device, "none", zero]
        assert memory.states + memory.moved == pytest.approx(alone.states, rel=0.1 if zero == 2 else 1e-6)
        assert (memory.moved > 0) == (memory.host > 0) == (offload == "cpu" and device == "cuda")
        assert (memory.activations, memory.gathered, memory.disk) == (alone.activations, alone.gathered, 0)
    assert found["cuda", "cpu", 3].states == 0
    assert found["cuda", "cpu", 2].states == pytest.approx(parameters, rel=0.02)
    assert found["cuda", "cpu", 1].states == pytest.approx(2 * parameters, rel=0.02)
    # The master weights, both moments and the gradient of the own piece; under ZeRO-3 the weights too.
    for zero, size in ((1, 4), (2, 4), (3, 5)):
        assert found["cuda", "cpu", zero].host == pytest.approx(size * parameters / 64, rel=0.02)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_disk_lies_all_but_the_gradient_and_buffers(device: str) -> None:
    run = asked(resolve.load("coatnet7-jft3b-224"), device, offload="nvme", offload_path="/local", zero=3)
    plan = layout(run, 64)
    found = estimate(run, plan, 1000)
    share = 4 * 2.442e9 / 64
    assert found.disk == pytest.approx(4 * share, rel=0.001)  # weights, their fp32 masters, two moments
    here = found.states if device == "cpu" else found.host
    assert share < here < share + 4 * 5 * (8 << 20) + 4 * 10 * 37_748_736 / 64 + 4
    assert (found.states == 0) == (device == "cuda")
    averaged = replace(run, optim=replace(run.optim, ema=0.999))
    assert estimate(averaged, plan, 1000).disk == pytest.approx(5 * share, rel=0.001)


def test_from_a_disk_one_block_is_whole_or_in_fp32_all_that_is_not_made_again() -> None:
    run = asked(resolve.load("coatnet5-jft300m-224"), offload="nvme", offload_path="/local", zero=3, micro_batch=256)
    fp32 = replace(run, precision=replace(run.precision, dtype="fp32"))
    plan, whole = layout(run, 16), 4 * 687e6
    for changed in (run, fp32):
        assert estimate(changed, plan, 1000).gathered < 0.11 * whole
    kept = asked(fp32, recompute="none", offload="nvme", offload_path="/local", zero=3, micro_batch=256)
    assert estimate(kept, plan, 1000).gathered == pytest.approx(whole, rel=0.01)


def test_moments_in_bf16_are_half_as_large() -> None:
    run = resolve.load("coatnet5-jft300m-224")
    half = replace(run, precision=replace(run.precision, moments="bf16"))
    plan, parameters = layout(run, 64), 4 * 688e6
    less = estimate(run, plan, 1000).states - estimate(half, plan, 1000).states
    assert less == pytest.approx(parameters / 64, rel=0.02)


def test_more_than_the_hosts_memory_is_refused_with_what_would_do() -> None:
    run = asked(resolve.load("coatnet7-jft3b-224"), "cuda", offload="cpu", zero=3)
    plan = layout(run, 8)
    need = 8 * estimate(run, plan, 1000).host
    assert require_elsewhere(run, plan, 1000, 8, need) == 0
    with pytest.raises(InputError, match=r"the 8 ranks of this machine need about 4\d\.\d GB.*parallel.offload nvme"):
        require_elsewhere(run, plan, 1000, 8, need - 1)
    run = asked(run, "cuda", offload="nvme", offload_path="/local")
    assert require_elsewhere(run, plan, 1000, 8, need) == 8 * estimate(run, plan, 1000).disk
    with pytest.raises(InputError, match=r"beside the disk, there are 1.0; nearest valid: more machines"):
        require_elsewhere(run, plan, 1000, 8, 1_000_000_000)


def test_zero3_counts_the_weights_it_has_gathered() -> None:
    """Up to half of stage3_max_reuse_distance, 1e9 elements, and what is on its way."""
    small, large = (resolve.load(name) for name in ("coatnet0-in1k-224", "coatnet7-jft3b-224"))
    of_small = estimate(asked(small, zero=3, micro_batch=32), layout(asked(small, zero=3, micro_batch=32), 8), 1000)
    assert of_small.gathered == pytest.approx(4 * 25e6, rel=0.03)
    of_large = estimate(asked(large, zero=3), layout(asked(large, zero=3), 64), 1000)
    assert 4 * 5e8 < of_large.gathered < 4 * 7e8
    assert estimate(asked(large, zero=2), layout(asked(large, zero=2), 64), 1000).gathered == 0


def pipelined(zero: int, recompute: Recompute = "full", **more: Any) -> tuple[Run, Layout]:
    run = resolve.load("coatnet2-in1k-224")
    run = replace(run, norm=replace(run.norm, replica_batch=16))
    run = asked(run, pipeline=4, zero=zero, recompute=recompute, micro_batch=32, **more)
    return run, layout(run, 8)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("balance", partition.BALANCES)
def test_the_worst_stage_is_reported(zero: int, balance: str) -> None:
    run, plan = pipelined(zero, balance=balance)
    each = [estimate(run, plan, 1000, stage) for stage in range(4)]
    assert [memory.stage for memory in each] == [0, 1, 2, 3]
    assert estimate(run, plan, 1000) == max(each, key=lambda memory: memory.total)
    assert len({memory.total for memory in each}) > 1
    cut = partition.stages(run, 1000, 32)
    for memory, part in zip(each, cut, strict=True):
        share = {0: 16.0, 1: 8 + 12 / 2, 2: 4 + 16 / 2, 3: 20 / 2}[zero]
        more = 4 * 4 * 4 * 1024**2 if zero == 2 else 0  # gradients of weights that reach over the edge of a piece
        assert -4 <= memory.states - share * part.parameters <= more + 4


def test_stages_that_keep_their_activations_keep_those_of_every_micro_batch_in_flight() -> None:
    run, plan = pipelined(1, "none")
    blocks = partition.block_bytes(run, 1000, 32, "none", "cpu")
    for number, part in enumerate(partition.stages(run, 1000, 32)):
        saved = sum(block.saved for block in blocks[part.first : part.last])
        found = estimate(run, plan, 1000, number).activations
        flying = in_flight(4, number, plan.accumulation)
        assert flying == 4 - number
        # Boundaries on their way and the pictures on top, no more than a tenth of the rest.
        assert flying * saved < found < 1.1 * flying * saved + 9 * 32 * max(block.boundary for block in blocks)


def test_stages_that_are_made_again_keep_inputs_and_the_inside_of_one() -> None:
    run, plan = pipelined(3)
    kept, _ = pipelined(1, "none")
    blocks = partition.block_bytes(run, 1000, 32, "none", "cpu")
    cut = partition.stages(run, 1000, 32)
    for number, part in enumerate(cut):
        inside = sum(block.saved for block in blocks[part.first : part.last])
        found = estimate(run, plan, 1000, number).activations
        boundary = max(stage.boundary_bytes for stage in cut)
        loaded = plan.accumulation * 32 * 3 * 224 * 224  # of a step, in bytes
        assert inside < found - loaded < inside + (4 + 11) * boundary + 5 * 4 * 32 * 3 * 224 * 224
    assert estimate(run, plan, 1000).activations < 0.6 * estimate(kept, plan, 1000).activations


def test_the_stage_that_does_not_fit_is_named_with_what_would() -> None:
    run, plan = pipelined(1, "none")
    need = estimate(run, plan, 1000)
    with pytest.raises(InputError) as refused:
        require_fit(run, plan, 1000, need.total - 1)
    assert f"a rank of stage {need.stage} of 4" in str(refused.value)
    hints = str(refused.value).partition("nearest: ")[2]
    for hint in ("--parallel.recompute selective", "--parallel.zero 2", "--parallel.micro-batch 16"):
        assert hint in hints
    for words in hints.split(", or "):  # each is allowed, and fits
        changes = dict(re.findall(r"--parallel\.([a-z-]+) (\w+)", words))
        parallel: dict[str, Any] = {
            name.replace("-", "_"): int(v) if v.isdecimal() else v for name, v in changes.items()
        }
        changed = asked(run, **parallel)
        resolve.check(changed)
        assert require_fit(changed, layout(changed, 8), 1000, need.total - 1).total < need.total


def test_where_no_single_setting_is_enough_all_are_named_together() -> None:
    run = asked(resolve.load("coatnet2-in1k-224"), zero=0, recompute="none", micro_batch=64)
    plan = layout(run, 8)
    changed = asked(run, zero=3, recompute="full", micro_batch=32)
    enough = estimate(changed, layout(changed, 8), 1000).total
    words = "--parallel.zero 3 --parallel.recompute full --parallel.micro-batch 32"
    with pytest.raises(InputError, match=f"nearest: {words}$"):
        require_fit(run, plan, 1000, enough)
    assert require_fit(changed, layout(changed, 8), 1000, enough).total == enough
    with pytest.raises(InputError, match="nearest: more ranks, or a smaller model"):
        require_fit(run, plan, 1000, FIXED["cpu"])


def test_too_large_is_refused_with_what_would_fit() -> None:
    run = resolve.load("coatnet0-in1k-224")
    plan = layout(run, 8)
    with pytest.raises(InputError) as refused:
        require_fit(run, plan, 1000, 16_000_000_000)
    for word in (
        "parallel.micro_batch = 512",
        "8 ranks",
        "there are 16.0",
        "micro-batch 64",
    ):
        assert word in str(refused.value)
    small = replace(run, parallel=replace(run.parallel, micro_batch=64))
    assert FIXED["cpu"] < require_fit(small, layout(small, 8), 1000, 16_000_000_000).total < 16_000_000_000


def test_the_cheapest_recomputation_that_fits_is_named() -> None:
    run = resolve.load("coatnet0-in1k-224")
    kinds: tuple[Recompute, ...] = ("none", "selective", "full")
    runs = {kind: replace(run, parallel=replace(run.parallel, recompute=kind)) for kind in kinds}
    plan = layout(run, 8)
    none, selective, full = (estimate(runs[kind], plan, 1000).total for kind in kinds)
    assert full < selective < none
    with pytest.raises(InputError, match="recompute selective"):
        require_fit(runs["none"], plan, 1000, selective)
    assert require_fit(runs["selective"], plan, 1000, selective).total == selective
    with pytest.raises(InputError, match="recompute full"):
        require_fit(runs["none"], plan, 1000, selective - 1)
    with pytest.raises(InputError, match=r"micro-batch (\d+)") as refused:
        require_fit(runs["full"], plan, 1000, full - 1)
    named = int(str(refused.value).rpartition("micro-batch ")[2].split()[0].rstrip(","))
    assert require_fit(runs["full"], replace(plan, micro_batch=named), 1000, full - 1).total < full
