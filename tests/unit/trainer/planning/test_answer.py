"""What a plan says: rows, refusals with what would fit, the run's own layout, costs that are the ledger's."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from trainer.cost.ledger import DAY, P_REF, U_REF
from trainer.planning import answer, table
from trainer.planning.answer import Answer
from trainer.planning.choose import Planner
from trainer.planning.data_set import Size
from trainer.planning.machines import HOST_USABLE
from trainer.planning.outlook import BETWEEN

from .conftest import machines_of, planner_of, rates_of

SIZE = Size(300_000_000, 18_291, "as given")


def asked(recipe: str = "coatnet5-jft300m-224", count: int = 64, **parallel: Any) -> tuple[Planner, Answer]:
    planner = planner_of(recipe, count, SIZE.classes, **parallel)
    run = replace(planner.run, cluster=replace(planner.run.cluster, price=2.5))
    planner.run = run
    return planner, answer.answer(planner, answer.job_of(run, SIZE))


@pytest.fixture(scope="module")
def five() -> tuple[Planner, Answer]:
    return asked()


def test_the_best_come_first(five: tuple[Planner, Answer]) -> None:
    _, found = five
    seconds = [one.time.total for one, _ in found.best if one.time is not None]
    assert len(seconds) == 5
    assert seconds == sorted(seconds)


def test_costs_follow_from_the_step(five: tuple[Planner, Answer]) -> None:
    """The ledger's own identities, at what a step is foretold to take."""
    planner, found = five
    job = answer.job_of(planner.run, SIZE)
    for one, run in found.best:
        assert one.time is not None
        seconds = job.steps * one.time.total
        assert run.images_per_second == pytest.approx(4096 / one.time.total)
        assert run.seconds == pytest.approx(seconds / run.ratio)
        flops = 6.0 * job.multiply_adds * job.steps * 4096
        assert run.ledger.model_flops == flops
        assert answer.mfu(run) == pytest.approx(flops / (64 * seconds * 989.4e12))
        assert run.ledger.core_days_flops == pytest.approx(flops / (DAY * P_REF * U_REF))
        core_days = run.ledger.core_days_device
        assert core_days is not None
        lost = run.ratio  # of the time the devices are held, what trains
        assert run.ledger.core_days_flops / core_days == pytest.approx((answer.mfu(run) or 0) * lost / U_REF)
        assert run.ledger.money == pytest.approx(2.5 * 64 * run.seconds / 3600)
        assert run.ledger.energy_kwh == pytest.approx(0.7 * 64 * run.seconds / 3600)  # 700 W each
        assert run.failures == pytest.approx(run.seconds * 64 / BETWEEN)
        assert run.interval >= one.time.total
        assert 0.9 < run.ratio < 1


def test_more_devices_fail_more_often_and_save_more_often() -> None:
    few, many = (asked(count=count)[1].best[0][1] for count in (8, 256))
    assert many.failures / many.seconds > 30 * few.failures / few.seconds
    assert many.interval < few.interval


def test_the_runs_own_layout_is_beside_them() -> None:
    _, found = asked(recompute="full", zero=3)
    assert found.pinned is not None
    own, run = found.pinned
    assert (own.parallel.zero, own.parallel.recompute) == (3, "full")
    assert run.days > found.best[0][1].days
    _, found = asked(count=8, recompute="none", zero=0, micro_batch=512)
    assert found.pinned is None
    assert re.fullmatch(r"needs \d+\.\d GB of 73\.6", found.why)
    _, found = asked(micro_batch=48)
    assert "parallel.micro_batch = 48" in found.why


def test_every_other_value_has_its_verdict(five: tuple[Planner, Answer]) -> None:
    _, found = five
    verdicts = dict(found.others)
    best = found.best[0][0]
    assert f"ZeRO {best.parallel.zero}" not in verdicts
    assert {f"ZeRO {zero}" for zero in range(4) if zero != best.parallel.zero} <= verdicts.keys()
    for verdict in verdicts.values():
        slower = re.match(r"(\d+\.\d\d)x the time, \d+\.\d GB \(.+\)$", verdict)
        lacking = re.match(r"needs (\d+\.\d) GB of 73\.6", verdict)
        assert slower or lacking, verdict
        assert not slower or float(slower[1]) >= 1.0
        assert not lacking or float(lacking[1]) > 73.5


@pytest.mark.parametrize(("gpu", "count"), [("a10", 1), ("rtx4090", 2)])
def test_what_fits_nowhere_names_the_smallest_cluster_that_would_do(gpu: str, count: int) -> None:
    run = resolve.load("coatnet7-jft3b-224")
    run = replace(run, model=replace(run.model, resolution=512))
    planner = Planner(run, SIZE.classes, replace(machines_of(count, gpu), per_node=8), rates_of(gpu))
    with pytest.raises(InputError) as refused:
        answer.answer(planner, answer.job_of(run, SIZE))
    message = str(refused.value)
    assert f"no layout fits {count} x {gpu}" in message
    named = re.search(r"that would: (\d+) x", message)
    assert named
    smallest = int(named[1])
    assert smallest > count
    assert planner.on(smallest).fits()
    assert not any(planner.on(devices).fits() for devices in range(1, min(smallest, 9)))


def test_the_smallest_cluster_may_keep_states_on_the_host() -> None:
    assert answer.smallest(planner_of("coatnet5-jft300m-224", 8, 18_291, "a100-40gb")) == "1 x a100-40gb in one machine"


def with_host(planner: Planner, size: float) -> Planner:
    """The planner for machines with so many bytes of memory of their own."""
    other = planner.on(planner.machines.devices)
    other.machines = replace(other.machines, device=replace(other.machines.device, host_memory=size))
    return other


def test_states_that_the_hosts_memory_cannot_take_are_refused() -> None:
    planner = planner_of("coatnet5-jft300m-224", 1, 18_291, "a100-40gb")
    need = min(one.host for one in planner.candidates() if one.time is not None)  # nothing fits but with offload
    assert need > 10e9
    assert with_host(planner, need / HOST_USABLE + 1).fits()
    short = with_host(planner, need / HOST_USABLE - 10)
    assert not short.fits()
    assert all(one.time is None for one in short.candidates())
    with pytest.raises(InputError) as refused:
        answer.answer(short, answer.job_of(short.run, SIZE))
    gigabytes = f"{need / 1e9:.1f}"
    assert f"offload cpu) needs {gigabytes} GB of {gigabytes} GB host memory; the smallest" in str(refused.value)
    assert "1 x a100-40gb" not in answer.smallest(short)


def test_all_ranks_of_a_machine_share_its_memory() -> None:
    alone = planner_of("coatnet7-jft3b-224", 4, 18_291, "rtx4090")
    kind = replace(alone.run.parallel, zero=2, offload="cpu", recompute="full", compile=False)
    plan = next(one.layout for one in alone.candidates() if one.parallel.zero == 2 and one.layout.stages == 1)
    estimate = alone.evaluate(kind, plan)
    assert estimate.host == 4 * estimate.memory.host
    apart = alone.on(4)
    apart.machines = replace(alone.machines, per_node=2)
    assert apart.evaluate(kind, plan).host == 2 * estimate.memory.host


def test_a_short_host_is_among_the_reasons() -> None:
    planner = with_host(planner_of("coatnet7-jft3b-224", 8, 18_291, "rtx4090"), 40e9)
    found = answer.answer(planner, answer.job_of(planner.run, SIZE))
    assert re.match(r"needs \d+\.\d GB of 36\.0 GB host memory \(", dict(found.others)["offload cpu"])


def test_ranks_that_cannot_divide_the_batch_are_told_so(small: Run) -> None:
    planner = Planner(small, 1000, machines_of(31, per_node=31), rates_of())
    with pytest.raises(InputError, match=r"31 ranks can neither divide it .* nearest: 1 x h100"):
        answer.answer(planner, answer.job_of(small, SIZE))


def test_the_table_and_the_document_say_the_same(five: tuple[Planner, Answer]) -> None:
    planner, found = five
    job = answer.job_of(planner.run, SIZE)
    shown = table.text(found, job, SIZE, "assumed")
    document = json.loads(json.dumps(answer.document(found, job, SIZE, "assumed")))
    best = document["best"][0]
    assert f"{best['days']:,.3g}" in shown
    assert f"{best['memory']['total'] / 1e9:.1f}" in shown
    assert f"{best['money']:,.0f} USD" in shown
    assert f"{document['layouts']:,} layouts" in shown
    assert document["machines"]["nodes"] == 8
    total = sum(best["step"][part] for part in ("compute", "again", "bubble", "exposed", "update", "rest"))
    assert total == pytest.approx(best["step"]["total"])
    assert "failures to expect" in shown
    assert max(map(len, shown.splitlines())) < 180


def test_no_share_of_the_traffic_is_below_nothing(five: tuple[Planner, Answer]) -> None:
    """Where another stage's end is longer than all traffic of the one that decides, nothing of that is hidden."""
    best, _ = five[1].best[0]
    assert best.time is not None
    time = replace(best.time, exposed=3.0, traffic=2.0)
    assert table.seconds(replace(best, time=time)).endswith("; 0% of the traffic is hidden")
    assert table.seconds(replace(best, time=replace(time, exposed=0.5))).endswith("; 75% of the traffic is hidden")


def test_compiled_code_counts_where_its_speed_is_known_as_well_as_eager_code() -> None:
    run = resolve.load("coatnet5-jft300m-224")
    machines, both = machines_of(8), rates_of()
    assert answer.planner_of(run, SIZE, machines, both).styles == ("eager", "compiled")
    measured = {**both, "eager": replace(both["eager"], measured=("forward",))}
    assert answer.planner_of(run, SIZE, machines, measured).styles == ("eager",)
    cpu = machines_of(2, "cpu")
    assert answer.planner_of(run, SIZE, cpu, rates_of("cpu")).styles == ("eager",)
