"""Counts against the golden integers and the paper's rows (COATNET.md section 3), and the spec's own rules."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from configs.errors import InputError
from models import coatnet, cost, norm, spec
from models.attention import RelativeAttention
from models.spec import SPECS, Spec
from trainer.engine.optim import parameter_groups

PAPER = [f"coatnet{number}" for number in range(8)] + ["coatnet3-dagger"]


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("coatnet0", 25_036_948, 4_141_888_512),
        ("coatnet3", 166_966_648, 34_372_257_792),
        ("coatnet7", 2_441_973_112, 457_872_592_896),
    ],
)
def test_golden_integers(name: str, parameters: int, multiply_adds: int) -> None:
    counted = cost.count(spec.get(name))
    assert (counted.parameters, counted.multiply_adds) == (parameters, multiply_adds)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("coatnet0", [38_848, 189_584, 1_084_752, 8_768_604, 13_594_032, 1_361_128]),
        ("coatnet7", [337_728, 1_324_800, 10_213_888, 82_798_592, 2_111_343_008, 223_435_696, 12_519_400]),
    ],
)
def test_golden_integers_per_stage(name: str, parameters: list[int]) -> None:
    assert [count for count, _ in cost.count(spec.get(name)).by_stage().values()] == parameters


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_within_0_7_percent_of_the_paper(name: str) -> None:
    published = SPECS[name].published.parameters
    assert published is not None
    assert cost.count(SPECS[name], 224).parameters == pytest.approx(published, rel=0.007)


@pytest.mark.parametrize(("resolution", "tolerance", "rows"), [(224, 0.02, 4), (384, 0.03, 6), (512, 0.04, 7)])
def test_multiply_adds_are_within_the_tolerance_of_the_paper(resolution: int, tolerance: float, rows: int) -> None:
    compared = 0
    for row in cost.table(resolution):
        if row["published_multiply_adds"] is not None:
            assert row["multiply_adds"] == pytest.approx(row["published_multiply_adds"], rel=tolerance), row["name"]
            compared += 1
    assert compared == rows


def test_published_figures_belong_to_one_placement_of_the_stride() -> None:
    by_name = {row["name"]: row for row in cost.table(384, "depthwise")}
    assert by_name["coatnet3"]["published_multiply_adds"] == 114e9
    assert by_name["coatnet0"]["published_multiply_adds"] is None
    assert {row["name"]: row for row in cost.table(384)}["coatnet3"]["published_multiply_adds"] == 107.4e9


def test_table_has_the_keys_of_the_command() -> None:
    rows = cost.table(224)
    assert [row["name"] for row in rows] == list(SPECS)
    keys = {"name", "resolution", "stride", "parameters", "multiply_adds"}
    assert all(set(row) == keys | {"published_parameters", "published_multiply_adds"} for row in rows)


def test_printed_width_of_coatnet6_misses_the_published_counts() -> None:
    variant = cost.count(spec.get("coatnet6-table12"))
    assert round(variant.parameters / 1e9, 3) == 1.348
    assert round(cost.count(spec.get("coatnet6-table12"), 512).multiply_adds / 1e9) == 1465


@pytest.mark.parametrize(("resolution", "nearest"), [(100, 96), (0, 32), ((64, 50), 64)])
def test_resolution_must_be_a_multiple_of_the_total_stride(resolution: spec.Resolution, nearest: int) -> None:
    with pytest.raises(InputError, match=f"multiple of 32.*nearest valid: {nearest}"):
        cost.count(spec.get("coatnet0"), resolution)


def test_core_days_are_those_of_table_5() -> None:
    found = {name: published.published.core_days for name, published in SPECS.items() if published.published.core_days}
    assert found == {"coatnet3-dagger": 580, "coatnet4": 950, "coatnet5": 1820, "coatnet6": 6600, "coatnet7": 20100}


def test_unknown_model_is_answered_with_the_closest_name() -> None:
    with pytest.raises(InputError, match=r"did you mean.*'coatnet0'"):
        spec.get("coatnet_0")


def test_demo_model_has_all_five_stages_and_about_300_thousand_parameters() -> None:
    nano: Spec = spec.get("coatnet-nano")
    assert [stage.block for stage in nano.stages] == ["stem", "mbconv", "mbconv", "transformer", "transformer"]
    assert 250_000 < cost.count(nano, 64, classes=10).parameters < 350_000


def test_counting_does_not_import_torch() -> None:
    program = "import sys, models.cost; assert len(models.cost.table()) > 8; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", [*PAPER, "coatnet6-table12"])
@pytest.mark.parametrize("changes", [{}, {"relative_bias": "none"}, {"conv_norm": "layer"}])
def test_the_weights_are_those_of_the_network_in_its_order(name: str, changes: dict[str, Any]) -> None:
    found = replace(spec.get(name), **changes)
    model = coatnet.build(found, resolution=64, classes=7)
    decaying = {path for group in parameter_groups(model.named_parameters(), 0.1)[:1] for path in group["names"]}
    layers = dict(model.named_modules())
    kinds = {nn.Conv2d: "map", nn.Linear: "map", norm.BatchNorm: "batch_norm", RelativeAttention: "table"}
    expected = [
        (path, parameter.numel(), kinds.get(type(layers[path.rpartition(".")[0]]), "layer_norm"), path in decaying)
        for path, parameter in model.named_parameters()
    ]
    counted = cost.count(found, 64, classes=7).blocks
    assert [(f"{block.name}.{weight.path}", *weight[1:]) for block in counted for weight in block.weights] == expected
