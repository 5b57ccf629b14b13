"""The formulas of bytes on the wire, by hand; `tests/parallel/test_trace.py` holds them against real runs."""

from dataclasses import asdict, replace

import pytest

from trainer.stages.trace import Operation
from trainer.stages.wire import Share, Traffic, counted, expected, of_step

# 1 M weights of a linear map, 100 of a norm; 50 channels.
SHARE = Share(
    zero=1,
    dtype="fp32",
    recompute="none",
    accumulation=4,
    replicas=8,
    stages=1,
    stage=0,
    groups=[[(1_000_000, 1)], [(100, 0)]],
    channels=50,
    team=1,
    to_next=0,
    to_previous=0,
    threshold=10_000,
    reuse=1_000_000_000,
    shard=0,
)
STATISTICS = 4 * (2 * 50 + 1)


def of(**changes: object) -> dict[str, int]:
    return expected(replace(SHARE, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"zero": 0}, {"all_reduce": 4_000_400}),
        ({"zero": 0, "dtype": "bf16"}, {"all_reduce": 4_000_400}),  # fp32 all the same
        ({"zero": 1}, {"all_reduce": 4_000_400, "all_gather": 4 * (1_000_000 + 112)}),  # 100 padded to 16s
        ({"zero": 1, "dtype": "bf16"}, {"all_reduce": 2_000_400, "all_gather": 4 * (1_000_000 + 112)}),
        ({"zero": 2}, {"all_reduce": 4 * 4_000_400, "all_gather": 4 * (1_000_000 + 112)}),
        # The large weight is gathered for each of four micro-batches, the small one (padded to 8s) once.
        ({"zero": 3}, {"reduce_scatter": 4 * 4_000_416, "all_gather": 4 * 4_000_000 + 416}),
        ({"zero": 3, "dtype": "bf16"}, {"reduce_scatter": 4 * 2_000_416, "all_gather": 4 * 2_000_000 + 416}),
        ({"zero": 3, "recompute": "full"}, {"reduce_scatter": 4 * 4_000_416, "all_gather": 4 * 4_000_000 + 416}),
        ({"zero": 3, "reuse": 0}, {"reduce_scatter": 4 * 4_000_416, "all_gather": 8 * 4_000_000 + 416}),
        (
            {"zero": 3, "reuse": 0, "recompute": "full"},
            {"reduce_scatter": 4 * 4_000_416, "all_gather": 12 * 4_000_000 + 416},
        ),
        ({"zero": 3, "threshold": 50}, {"reduce_scatter": 4 * 4_000_416, "all_gather": 4 * 4_000_416}),
    ],
)
def test_weights_and_gradients(changes: dict[str, object], wanted: dict[str, int]) -> None:
    assert of(**changes) == {**wanted, "all_reduce": wanted.get("all_reduce", 0) + STATISTICS}


def test_a_shard_group_takes_all_but_the_first_gathering() -> None:
    parts = [part for part in of_step(replace(SHARE, zero=3, shard=2, reuse=0)) if part.purpose.startswith("large")]
    assert [(part.ranks, part.payload) for part in parts] == [(8, 4_000_000), (2, 7 * 4_000_000)]
    plain = next(part for part in of_step(replace(SHARE, zero=3, reuse=0)) if part.purpose == "large weights")
    assert plain.payload == sum(part.payload for part in parts)
    assert sum(part.sent for part in parts) == 4_000_000 * 7 // 8 + 7 * 4_000_000 // 2 < plain.sent


@pytest.mark.parametrize("zero", range(4))
def test_a_rank_alone_sends_nothing(zero: int) -> None:
    assert of(zero=zero, replicas=1) == {}


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4_096), ("bf16", 2_048)])
def test_a_boundary_is_crossed_by_every_micro_batch(dtype: str, size: int) -> None:
    middle = replace(SHARE, zero=1, dtype=dtype, stages=3, stage=1, to_next=size, to_previous=2 * size)
    assert expected(middle)["send"] == 4 * 3 * size
    alone = replace(middle, replicas=1)
    assert expected(alone) == {"send": 4 * 3 * size}


def test_a_stage_that_makes_its_forward_pass_again_gathers_three_times() -> None:
    first = replace(SHARE, zero=3, stages=2, stage=0)
    assert expected(first)["all_gather"] == 3 * 4 * 4_000_000 + 416
    assert expected(replace(first, stage=1))["all_gather"] == 4 * 4_000_000 + 416
    assert expected(replace(first, accumulation=1))["all_gather"] == 3 * 4_000_000 + 416 + 416


@pytest.mark.parametrize(
    ("zero", "stages", "stage", "recompute", "passes"),
    [
        (0, 1, 0, "none", 1),
        (3, 1, 0, "full", 2),
        (3, 1, 0, "selective", 2),
        (1, 2, 0, "full", 2),  # keeps activations, block by block
        (2, 2, 0, "none", 2),  # the stage is made again,
        (2, 2, 0, "full", 2),  # which is what "full" asks for,
        (2, 2, 0, "selective", 3),  # and here its blocks once more
        (2, 2, 1, "full", 1),  # the last stage goes back at once
    ],
)
def test_a_team_gathers_its_statistics_in_every_pass(
    zero: int, stages: int, stage: int, recompute: str, passes: int
) -> None:
    share = replace(SHARE, zero=zero, stages=stages, stage=stage, recompute=recompute, team=2)
    found = {traffic.purpose: traffic.payload for traffic in of_step(share)}
    assert found["BatchNorm, forward"] == 2 * (2 * 50 * 4) * 4 * passes
    assert found["BatchNorm, backward"] == (2 * 50 * 4) * 4


@pytest.mark.parametrize(
    ("kind", "sent"), [("all_reduce", 1500), ("all_gather", 750), ("reduce_scatter", 750), ("send", 1000)]
)
def test_a_ring_of_four(kind: str, sent: int) -> None:
    assert Traffic("", kind, 4, 1000).sent == sent


def test_what_is_counted() -> None:
    def operation(kind: str, size: int, group: str = "0", ranks: tuple[int, ...] = (0, 1)) -> tuple[Operation, ...]:
        return (Operation(kind, group, ranks, None, "", "", size),)

    program = [
        operation("all_reduce", 100),
        operation("all_reduce", 17),
        operation("all_reduce", 16),  # a flag
        operation("all_reduce", 1000, group="control"),
        operation("all_gather", 1000, ranks=(0,)),  # goes nowhere
        operation("receive", 1000),  # counted where it is sent
        operation("send", 20) + operation("receive", 20) + operation("send", 30),
    ]
    assert counted(program, "control") == {"all_reduce": 117, "send": 50}


def test_a_share_survives_a_file() -> None:
    assert expected(Share(**asdict(SHARE))) == expected(SHARE)
