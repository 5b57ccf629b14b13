"""The planner's choice as a run's settings, on machines that need not be here, and how large a data set is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from data_pipeline.errors import DataError
from trainer.plan import layout
from trainer.planning import auto, auto_layout, data_set
from trainer.planning.data_set import Size

from .conftest import machines_of

SIZE = Size(1_281_167, 1000, "as given")


@pytest.fixture(autouse=True)
def nobody_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_choice_can_be_trained_and_is_faster_than_the_recipes_own() -> None:
    run = resolve.load("coatnet5-jft300m-224")
    found = auto.advise(run, Size(300_000_000, 18_291, ""), machines_of(64))
    resolve.check(found.run)
    assert layout(found.run, 64).micro_batch == found.run.parallel.micro_batch
    assert found.run.parallel.layout == "pinned"
    assert replace(found.run, parallel=run.parallel) == run  # nothing else is changed
    assert found.saved is not None
    assert found.saved > 0
    assert str(found).startswith(f"--parallel.layout auto would take {found.saved:.3g} days less: ")
    again = auto.advise(found.run, Size(300_000_000, 18_291, ""), machines_of(64))
    assert again.saved == pytest.approx(0.0)
    assert str(again) == ""


def test_a_login_node_can_ask_for_machines_elsewhere() -> None:
    run = resolve.load("coatnet7-jft3b-224")
    found = auto.advise_for(run, 64, 8, "h100")
    assert "days less" in str(found)
    with pytest.raises(InputError, match="no layout fits 1 x a10"):
        auto.advise_for(replace(run, model=replace(run.model, resolution=512)), 1, 1, "a10")


def test_auto_is_resolved_before_ranks_start(small: Run) -> None:
    run = replace(
        small,
        data=replace(small.data, synthetic=True),
        cluster=replace(small.cluster, device="cpu", ranks=2),
        parallel=replace(small.parallel, layout="auto", pipeline=7, micro_batch=5),
    )
    chosen = auto_layout.laid_out(run)
    assert chosen.parallel.layout == "pinned"
    assert layout(chosen, 2)
    assert chosen.cluster.ranks == 2
    assert auto_layout.laid_out(chosen) is chosen  # a pinned layout is nobody's business
    assert auto_layout.laid_out(run, world=4, local=4).parallel == auto_layout.laid_out(run, 4, 4).parallel


@pytest.mark.parametrize(("recipe", "samples"), [("coatnet0-in1k-224", 1_281_167), ("coatnet7-jft3b-224", 3 * 10**9)])
def test_data_that_are_not_here_have_their_published_size(recipe: str, samples: int) -> None:
    found = data_set.size(resolve.load(recipe))
    assert found.samples == samples
    assert "as published of" in found.origin


def test_what_the_caller_says_goes_first(tmp_path: Path) -> None:
    run = resolve.load("coatnet0-in1k-224")
    assert data_set.size(run, 20_000, 10) == Size(20_000, 10, "as given")
    assert data_set.size(run, samples=20_000).classes == 1000
    with pytest.raises(InputError, match="--samples"):
        data_set.size(run, samples=10)
    elsewhere = replace(run, data=replace(run.data, path=str(tmp_path / "mine")))
    with pytest.raises(DataError, match="no such folder"):
        data_set.size(elsewhere)
    (tmp_path / "in1k").mkdir()
    (tmp_path / "in1k" / "manifest.json").write_text(json.dumps({"damaged": True}))
    with pytest.raises(DataError):  # there are data: what is published of them is no excuse
        data_set.size(replace(run, data=replace(run.data, path=str(tmp_path / "in1k"))))
    made_up = data_set.size(replace(run, data=replace(run.data, synthetic=True, synthetic_classes=7)))
    assert (made_up.samples, made_up.classes) == (1_280_000, 7)
