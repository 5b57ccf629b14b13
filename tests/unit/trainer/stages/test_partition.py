"""Where a pipeline cuts: nothing is lost, no cut is better, and what a stage is said to hold it really holds."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from configs import resolve
from configs.errors import InputError
from configs.schema import Cluster, Model, Precision, Run
from models import activations, cost, spec
from trainer import cli
from trainer.commands.train import check_before_start
from trainer.engine import network
from trainer.stages import partition
from trainer.stages.partition import BALANCES, block_costs, cuts, fairscale_cuts, stage_weights, stages, table

FAMILY = [f"coatnet{number}" for number in range(8)]
NANO = replace(Run(), model=Model(name="coatnet-nano", resolution=64), cluster=Cluster(device="cpu"))
NAMES = [block.name for block in spec.get("coatnet-nano").blocks(64)]
with_fairscale = pytest.mark.skipif(
    importlib.util.find_spec("fairscale") is None,
    reason="NOT COMPARED WITH FAIRSCALE: it is not installed; pip install fairscale==0.4.13",
)


def asked(run: Run, **parallel: object) -> Run:
    return replace(run, parallel=replace(run.parallel, **parallel))  # type: ignore[arg-type]


def of(name: str, **parallel: object) -> Run:
    return asked(Run(model=Model(name=name)), **parallel)


def loads(costs: list[int], ends: tuple[int, ...], weights: list[int] | None = None) -> list[int]:
    sums = [sum(costs[first:last]) for first, last in pairwise((0, *ends))]
    return [weight * load for weight, load in zip(weights or [1] * len(sums), sums, strict=True)]


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", ["coatnet0", "coatnet5", "coatnet7"])
def test_stages_are_the_whole_network_in_order(name: str, balance: str) -> None:
    whole = cost.count(spec.get(name), 224, classes=21)
    for count in (1, 2, 7, len(whole.blocks)):
        found = stages(of(name, pipeline=count, balance=balance), 21, 4)
        assert len(found) == count
        assert all(stage.first < stage.last for stage in found)
        assert [block for stage in found for block in stage.blocks] == [block.name for block in whole.blocks]
        assert [(0, found[0].first), *((a.last, b.first) for a, b in pairwise(found))] == [
            (place, place) for place in [0, *(stage.last for stage in found[:-1])]
        ]
        assert sum(stage.parameters for stage in found) == whole.parameters
        assert sum(stage.share for stage in found) == pytest.approx(1)
        assert sum(stage.load for stage in found) == pytest.approx(1)
        assert found[-1].boundary_bytes == 0
        assert all(stage.boundary_bytes > 0 for stage in found[:-1])


def test_stages_are_cut_inside_s3_and_do_not_depend_on_the_machine() -> None:
    run = of("coatnet5", pipeline=4)
    found = stages(run, 1000, 8)
    assert {stage.blocks[0] for stage in found[2:]} <= {f"blocks.s3.{place}" for place in range(1, 28)}
    assert max(stage.load for stage in found) < 0.27
    assert stages(replace(run, cluster=Cluster(device="cuda")), 1000, 8) == found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_boundary_and_kept_bytes_are_those_of_the_real_tensors(dtype: str) -> None:
    run = asked(NANO, pipeline=len(NAMES), zero=1, recompute="full")
    run = replace(run, precision=Precision(dtype=dtype))  # type: ignore[arg-type]
    model = network.bare(run, 7, torch.device("cpu")).train()
    entered, left = [], []

    def watched(block: object, x: Tensor, drop: Tensor | None) -> Tensor:
        assert callable(block)
        output: Tensor = block(x, drop)
        entered.append(x.numel() * x.element_size())
        left.append(output.numel() * output.element_size())
        return output

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        model(torch.randn(6, 3, 64, 64), None, watched)
    found = stages(run, 7, 6)
    assert [stage.boundary_bytes for stage in found] == [*left[:-1], 0]
    assert [stage.activation_bytes for stage in found] == entered
    remade = stages(asked(run, zero=3), 7, 6)  # the input too, but the last stage makes nothing again
    assert [stage.activation_bytes for stage in remade[:-1]] == entered[:-1]
    blocks = activations.activations(spec.get("coatnet-nano"), 64, batch=6, dtype=run.precision.dtype, classes=7)
    assert remade[-1].activation_bytes == blocks[-1].saved != entered[-1]


def test_kept_bytes_follow_the_recomputation() -> None:
    kept = {}
    for recompute in ("none", "selective", "full"):
        found = stages(of("coatnet0", pipeline=3, zero=1, recompute=recompute), 1000, 4)
        blocks = activations.activations(spec.get("coatnet0"), 224, batch=4, recompute=recompute, device="cuda")
        kept[recompute] = sum(stage.activation_bytes for stage in found)
        assert kept[recompute] == sum(block.saved for block in blocks)
    assert kept["full"] < kept["selective"] < kept["none"]


@pytest.mark.parametrize(
    ("name", "stem", "s1", "s2", "s4"),
    [("coatnet3", 8, 21, 29, 4), ("coatnet5", 3, 9, 27, 2), ("coatnet7", 1, 4, 4, 2)],
)
def test_compute_weighs_stages_as_a_count_of_every_kernel_does(
    name: str, stem: float, s1: float, s2: float, s4: float
) -> None:
    """Per cent of a compiled training step on an H100 at 224 px, from the traffic and the work of every kernel."""
    costs = block_costs(of(name), 1000, 8)
    blocks = cost.count(spec.get(name)).blocks
    for stage, share in (("s0", stem), ("s1", s1), ("s2", s2), ("s4", s4)):
        own = sum(value for value, block in zip(costs, blocks, strict=True) if block.stage == stage)
        assert 100 * own / sum(costs) == pytest.approx(share, abs=2), stage


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_cut_is_better(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    count = data.draw(st.integers(1, len(costs)))
    weights = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    sent = data.draw(st.lists(st.integers(0, 5), min_size=len(costs), max_size=len(costs)))

    def badness(ends: tuple[int, ...]) -> tuple[int, int, int, tuple[int, ...]]:
        found = loads(costs, ends, weights)
        return max(found), sum(load**2 for load in found), sum(sent[end - 1] for end in ends[:-1]), ends

    every = [(*inner, len(costs)) for inner in combinations(range(1, len(costs)), count - 1)]
    assert cuts(costs, sent, count, weights) == min(every, key=badness)


def test_the_largest_stage_comes_before_even_stages() -> None:
    assert loads([1, 5, 2, 3], cuts([1, 5, 2, 3], [0] * 4, 3)) == [1, 5, 5]  # [6, 2, 3] has the smaller squares


@pytest.mark.parametrize("name", FAMILY)
def test_every_model_in_the_table_at_start(name: str) -> None:
    counts = {block.name: block for block in cost.count(spec.get(name), 224, classes=1000).blocks}
    sent = {b.name: b.boundary for b in activations.activations(spec.get(name), 224, device="cuda", classes=1000)}
    inner = set()
    for count in (2, 3, 4, 8, len(counts)):
        found = stages(of(name, pipeline=count), 1000, 8)
        inner |= {stage.blocks[0] for stage in found if re.match(r"blocks\.s3b?\.([1-9])", stage.blocks[0])}
        rows = [row.split() for row in table(found).splitlines()[1:]]
        assert [row[1:4] for row in rows] == [[stage.blocks[0], "..", stage.blocks[-1]] for stage in found]
        for row, stage in zip(rows, found, strict=True):
            own = [counts[block] for block in stage.blocks]
            share = sum(block.multiply_adds for block in own) / sum(block.multiply_adds for block in counts.values())
            assert float(row[5]) == pytest.approx(sum(block.parameters for block in own) / 1e6, abs=0.0051)
            assert float(row[7].rstrip("%")) == pytest.approx(100 * share, abs=0.051)
            leaving = 0 if stage is found[-1] else 8 * sent[stage.blocks[-1]]
            assert float(row[9]) == pytest.approx(leaving / 1e6, abs=0.0051)
        assert sum(float(row[8].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.051 * count)
    assert inner, "no cut lies inside the third stage"


def test_the_last_stage_is_given_more_where_the_others_are_made_again() -> None:
    """A step of a stage is four forward passes long, of the last one three."""
    better = []
    for name in FAMILY:
        costs = block_costs(of(name), 1000, 8)
        for count in (2, 3, 4, 6):
            remade, kept = (of(name, pipeline=count, zero=zero) for zero in (3, 1))
            assert (stage_weights(remade), stage_weights(kept)) == ([4] * (count - 1) + [3], [4] * count)
            weighed, plain = (tuple(s.last for s in stages(run, 1000, 8)) for run in (remade, kept))
            assert plain == cuts(costs, [0] * len(costs), count) or max(loads(costs, plain)) == max(
                loads(costs, cuts(costs, [0] * len(costs), count))
            )
            slowest = [max(loads(costs, ends, stage_weights(remade))) for ends in (weighed, plain)]
            assert slowest[0] <= slowest[1], (name, count)
            better.append(slowest[0] / slowest[1])
    assert min(better) < 0.93  # where two stages can be evened out


@pytest.mark.parametrize("balance", ["parameters", "activations"])
def test_what_a_stage_holds_does_not_depend_on_the_second_pass(balance: str) -> None:
    assert stage_weights(of("coatnet0", pipeline=3, zero=3, balance=balance)) == [4, 4, 4]


@with_fairscale
@pytest.mark.parametrize("name", FAMILY)
def test_fairscale_cuts_no_model_better(name: str) -> None:
    costs = block_costs(of(name), 1000, 8)
    for count in range(2, 9):
        theirs = fairscale_cuts(costs, count)
        ours = cuts(costs, [0] * len(costs), count)
        assert (len(theirs), theirs[-1]) == (count, len(costs))
        assert max(loads(costs, ours)) <= max(loads(costs, theirs))


@with_fairscale
@hypothesis_settings(max_examples=25, deadline=None)
@given(st.data())
def test_fairscale_cuts_nothing_better(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 10**9), min_size=4, max_size=14))
    count = data.draw(st.integers(2, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "PATIENCE", 2)
        try:
            theirs = fairscale_cuts(costs, count)
        except InputError:
            return  # no end, or an empty stage: there is nothing to compare with
    assert max(loads(costs, cuts(costs, [0] * len(costs), count))) <= max(loads(costs, theirs))


@with_fairscale
def test_fairscale_cuts_when_asked() -> None:
    costs = block_costs(of("coatnet1"), 1000, 8)
    own, theirs = (stages(of("coatnet1", pipeline=4, partition_impl=impl), 1000, 8) for impl in ("own", "fairscale"))
    assert tuple(stage.last for stage in theirs) == fairscale_cuts(costs, 4)
    assert max(stage.load for stage in own) < max(stage.load for stage in theirs)  # 1.2 times as much, in fact


@with_fairscale
def test_fairscale_without_an_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"leaves stage 7 of 9 without a block; nearest valid: 'own'"):
        fairscale_cuts([1, 2, 2, 1000, 2, 2, 1, 1, 1000, 1, 1000], 9)
    monkeypatch.setattr(partition, "PATIENCE", 1)
    with pytest.raises(InputError, match=r"found no cut into 5 stages within 1 s; nearest valid: 'own'"):
        fairscale_cuts([1, 1, 1, 1, 2, 2], 5)


def test_a_missing_fairscale_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairscale", None)
    with pytest.raises(InputError, match=re.escape("pip install -e '.[fairscale]'; nearest valid: 'own'")):
        stages(of("coatnet0", pipeline=2, partition_impl="fairscale"), 10, 4)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"pipeline": 10}, "parallel.pipeline = 10: coatnet-nano has only 9 blocks to cut between; nearest valid: 9"),
        ({"balance": "paramters"}, "unknown parallel.balance 'paramters'; did you mean 'parameters'?"),
        ({"balance": "nowhere.json"}, "parallel.balance = 'nowhere.json': cannot be read as JSON"),
    ],
)
def test_what_cannot_be_cut_is_refused(parallel: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        stages(asked(NANO, **parallel), 10, 4)


def test_a_wrong_balance_is_refused_before_the_launch() -> None:
    demo = resolve.load("demo-digits")
    run = asked(replace(demo, data=replace(demo.data, synthetic=True)), pipeline=2, balance="seconds")
    with pytest.raises(InputError, match=r"unknown parallel\.balance 'seconds'"):
        check_before_start(replace(run, cluster=Cluster(device="cpu")), 2)


def seconds(**changes: object) -> str:
    return json.dumps(dict.fromkeys(NAMES, 0.001) | {name.replace("_", "."): v for name, v in changes.items()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be an object {block: seconds}"),
        ("{", "cannot be read as JSON"),
        (json.dumps(dict.fromkeys(NAMES[1:], 1)), "lacks blocks.s0.0: it must have exactly the network's 9 blocks"),
        (seconds(blocks_s9_0=1), "has 'blocks.s9.0', no block of the network"),
        *((seconds(blocks_s3_1=bad), "blocks.s3.1 = ") for bad in (0, -1.5, float("nan"), float("inf"), True, "1")),
    ],
)
def test_a_file_that_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        stages(asked(NANO, balance=str(path), pipeline=2), 10, 4)


def test_measured_seconds_decide_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(seconds(blocks_head_0=1e3, blocks_s4_0=1e-12))  # the head takes longer than all before it
    assert [s.last for s in stages(asked(NANO, balance=str(path), pipeline=2), 10, 4)] == [8, 9]
    path.write_text(seconds(blocks_s0_0=1e3))
    assert [s.last for s in stages(asked(NANO, balance=str(path), pipeline=2), 10, 4)] == [1, 9]


def test_the_table_shows_each_stage() -> None:
    found = stages(of("coatnet7", pipeline=4), 1000, 8)
    head, *rows = table(found).splitlines()
    assert len({len(line) for line in (head, *rows)}) == 1
    assert head.split() == ["stage", "blocks", "parameters", "compute", "balance", "sends", "keeps"]
    for number, (row, stage) in enumerate(zip(rows, found, strict=True)):
        assert row.split()[:5] == [str(number), stage.blocks[0], "..", stage.blocks[-1], f"({len(stage.blocks)})"]
        assert f"{stage.parameters / 1e6:.2f} M" in row
        assert f"{stage.share:.1%}" in row
        assert f"{stage.boundary_bytes / 1e6:.2f} MB" in row
        assert row.endswith(f"{stage.activation_bytes / 1e6:.1f} MB")


def test_bench_blocks_writes_what_balance_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "blocks.json"
    words = "bench blocks demo-digits --batch 4 --rounds 2 --cluster.device cpu --model.name coatnet-nano --json --out"
    assert cli.main([*words.split(), str(path)]) == 0
    written = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert list(written) == NAMES
    assert min(written.values()) > 0
    assert written["blocks.s1.0"] > written["blocks.head.0"]
    costs = block_costs(asked(NANO, balance=str(path)), 10, 4)
    assert costs == [round(value * 1e9) for value in written.values()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch 4", "the recipe comes first"),
        ("demo-digits --batch 1", "--batch = 1: must be at least 2"),
        ("demo-digits --rounds 0", "--rounds = 0: must be at least 1"),
        ("demo-digits --out blocks.txt", "--out blocks.txt: must be FILE.json"),
        ("demo-digits --optim.lrr 1", "did you mean 'optim.lr'"),
    ],
)
def test_bench_blocks_refuses(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "blocks", *words.split()]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
