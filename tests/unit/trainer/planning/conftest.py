"""What the planner's tests share: machines, rates, planners."""

from dataclasses import replace
from typing import Any

import pytest

from configs import resolve
from configs.schema import Run
from models.operations import STYLES, Style
from trainer.machine import devices
from trainer.planning import rates
from trainer.planning.choose import Planner
from trainer.planning.machines import Machines
from trainer.planning.rates import Rates

NIC = 50e9


def machines_of(devices_count: int, gpu: str = "h100", per_node: int = 8) -> Machines:
    """So many devices."""
    return Machines(devices.named(gpu, devices_count), devices_count, min(per_node, devices_count), NIC)


def rates_of(gpu: str = "h100", **changes: Any) -> dict[Style, Rates]:
    """Assumed rates, with changes."""
    device = devices.named(gpu)
    return {
        style: replace(rates.assumed(device, "bf16", style, 0, "auto", NIC), **changes)
        for style in STYLES
        if style != "bound"
    }


def planner_of(recipe: str, count: int, classes: int = 1000, gpu: str = "h100", **parallel: Any) -> Planner:
    """A planner of a recipe."""
    run = resolve.load(recipe)
    run = replace(run, parallel=replace(run.parallel, **parallel))
    return Planner(run, classes, machines_of(count, gpu), rates_of(gpu))


@pytest.fixture
def small() -> Run:
    """A small run that many layouts fit."""
    run = resolve.load("coatnet0-in1k-224")
    return replace(run, norm=replace(run.norm, replica_batch=16), data=replace(run.data, global_batch=256))
