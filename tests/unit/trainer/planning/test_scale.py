"""Scale studies: efficiencies, the knee, their table and their picture."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from configs.errors import InputError
from trainer.cost.ledger import U_REF
from trainer.planning import answer, scale, table
from trainer.planning.data_set import Size
from trainer.planning.scale import DEARER, Study

from .conftest import planner_of

SIZE = Size(12_700_000, 21_841, "as given")
COUNTS = (8, 16, 32, 64, 128, 256)


@pytest.fixture(scope="module")
def found() -> Study:
    planner = planner_of("coatnet4-in21k-224", 256, SIZE.classes)
    return scale.study(planner, answer.job_of(planner.run, SIZE), COUNTS)


def test_efficiency_is_images_of_each_device_beside_the_fewest(found: Study) -> None:
    assert [point.devices for point in found.points] == list(COUNTS)
    first = found.points[0]
    assert first.best is not None
    assert (first.efficiency, first.weak) == (1.0, 1.0)
    for point in found.points:
        assert point.best is not None
        each = point.best[1].images_per_second / point.devices
        assert point.efficiency == pytest.approx(each / (first.best[1].images_per_second / 8))
        assert point.weak is not None
        assert 0 < point.weak <= 1.05
    assert (found.points[-1].weak or 0) > (found.points[-1].efficiency or 0)


def test_the_knee_is_the_most_devices_that_are_not_much_dearer(found: Study) -> None:
    hours = {point.devices: point.hours or 0 for point in found.points}
    cheapest = min(hours.values())
    assert hours[found.knee] <= DEARER * cheapest
    assert all(value > DEARER * cheapest for devices, value in hours.items() if devices > found.knee)
    assert found.knee < 256


def test_numbers_at_which_nothing_fits_are_said_and_not_counted() -> None:
    planner = planner_of("coatnet7-jft3b-224", 64, 18_291, gpu="a10")
    planner.run = replace(planner.run, model=replace(planner.run.model, resolution=512))
    given = scale.study(planner, answer.job_of(planner.run, SIZE), (1, 64))
    assert given.points[0].best is None
    assert "nothing fits" in scale.text(given).splitlines()[1]
    assert given.points[1].efficiency == 1.0  # the fewest that fit
    with pytest.raises(InputError, match="no layout fits a10 at any of 1 devices"):
        scale.study(planner, answer.job_of(planner.run, SIZE), (1,))


def test_both_tables_show_both_equivalents_and_say_what_they_are(found: Study) -> None:
    planner = planner_of("coatnet4-in21k-224", 64, SIZE.classes)
    job = answer.job_of(planner.run, SIZE)
    plan = answer.answer(planner, job)
    point = next(point for point in found.points if point.devices == 64)
    assert point.best is not None
    ledger = point.best[1].ledger
    assert ledger.core_days_device is not None
    assert ledger.mfu is not None
    assert ledger.core_days_flops / ledger.core_days_device == pytest.approx(ledger.mfu / U_REF)
    for shown in (scale.text(found), table.text(plan, job, SIZE, "assumed")):
        lines = shown.splitlines()
        assert re.search(f"{ledger.core_days_flops:,.4g} +{ledger.core_days_device:,.4g} ", shown)  # E_flop, E_dev
        assert any(re.search(r"device-hours +E_flop +E_dev +MWh", line) for line in lines)
        assert any(line.startswith("E_flop: TPUv3-core-days by FLOPs") for line in lines)
        assert any(line.startswith("E_dev:  TPUv3-core-days by device time") for line in lines)
    row = next(row for row in scale.document(found)["points"] if row["devices"] == 64)
    assert row["tpu_v3_core_days_flops"] == ledger.core_days_flops
    assert row["tpu_v3_core_days_device"] == ledger.core_days_device


def test_table_document_and_picture(found: Study) -> None:
    shown = scale.text(found)
    assert f"{found.knee:,}" in next(line for line in shown.splitlines() if "<- knee" in line)
    document = scale.document(found)
    assert document["knee"] == found.knee
    assert [row["devices"] for row in document["points"]] == list(COUNTS)
    picture = ElementTree.fromstring(scale.picture(found))
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert len(picture.findall("svg:svg", space)) == 2
    points = [len(line.attrib["points"].split()) for line in picture.iter(f"{{{space['svg']}}}polyline")]
    assert points == [len(COUNTS)] * 3  # strong, weak; cost over time
