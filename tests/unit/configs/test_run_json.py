"""A Run as JSON: exact both ways, strict when reading, hashed by what it trains."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.resolve import diff, digest, flat, from_json, load, names, recorded, to_json
from configs.schema import Augment, Cluster, Optim, Run, Tracking

positive = st.floats(min_value=1e-300, max_value=1e6, allow_nan=False)


@pytest.mark.parametrize("name", names())
def test_every_recipe_comes_back_exactly(name: str) -> None:
    run = load(name)
    assert from_json(to_json(run)) == run
    assert to_json(from_json(to_json(run))) == to_json(run)


@given(lr=positive, decay=positive, low=st.floats(1e-9, 0.5), text=st.text(), seed=st.integers(0, 2**31 - 1))
def test_any_value_comes_back_exactly(lr: float, decay: float, low: float, text: str, seed: int) -> None:
    optim, augment = Optim(lr=lr, min_lr=0.0, weight_decay=decay), Augment(crop_scale=(low, 0.75))
    run = Run(seed=seed, optim=optim, augment=augment, tracking=Tracking(experiment=text))
    back = from_json(to_json(run))
    assert back == run
    assert digest(back) == digest(run)


def test_flat_names_every_setting_once_and_whole_floats_are_floats() -> None:
    values = flat(Run(optim=Optim(epochs=3)))
    assert values["optim.epochs"] == 3
    assert type(values["optim.epochs"]) is float
    assert values["augment.crop_scale"] == (0.08, 1.0)
    assert list(values)[:4] == ["recipe", "name", "runs", "seed"]


def test_diff_names_what_differs() -> None:
    a = Run()
    b = replace(a, seed=5, optim=Optim(betas=(0.9, 0.95)))
    assert diff(a, b) == [("seed", 0, 5), ("optim.betas", (0.9, 0.999), (0.9, 0.95))]
    assert diff(a, a) == []


def test_digest_follows_what_is_trained_and_nothing_else() -> None:
    run = Run()
    labels = replace(
        run, recipe="r", name="n", runs="elsewhere", tracking=Tracking(mlflow=False), cluster=Cluster("cpu")
    )
    assert digest(labels) == digest(run)
    assert digest(Run(optim=Optim(epochs=300))) == digest(Run(optim=Optim(epochs=300.0)))
    changed = [replace(run, seed=1), Run(optim=Optim(lr=2e-3)), Run(augment=Augment(flip=False))]
    assert len({digest(other) for other in [run, *changed]}) == 4
    assert re.fullmatch("[0-9a-f]{12}", digest(run))


def broken(path: str, value: Any) -> str:
    """The default run's JSON with one value replaced, or removed where `value` is ..."""
    document = json.loads(to_json(Run()))
    *sections, leaf = path.split(".")
    inner = document
    for section in sections:
        inner = inner[section]
    inner[leaf] = value
    if value is ...:
        del inner[leaf]
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.learning_rate", 1.0, "unknown field 'optim.learning_rate'"),
        ("optim.lrr", 1.0, "did you mean 'optim.lr'"),
        ("modle", {}, "did you mean 'model'"),
        ("optim.lr", "0.1", "optim.lr = '0.1': must be of type float, not str"),
        ("optim.lr", True, "optim.lr = True: must be of type float, not bool"),
        ("optim.lr", -0.1, "optim.lr = -0.1: must be positive"),
        ("optim.lr", ..., "optim.lr: missing"),
        ("optim.lr", None, "must be of type float, not NoneType"),
        ("optim.betas", [0.9], "optim.betas = [0.9]: must be 2 values"),
        ("optim.betas", [0.9, "x"], "optim.betas[1] = 'x'"),
        ("seed", 1.5, "seed = 1.5: must be of type int, not float"),
        ("data.workers", False, "data.workers = False: must be of type int, not bool"),
        ("augment.flip", 1, "augment.flip = 1: must be of type bool, not int"),
        ("parallel.zero", True, "parallel.zero = True: must be one of 0, 1, 2, 3"),
        ("parallel.zero", 9, "nearest valid: 3"),
        ("optim.schedule", "cosin", "nearest valid: 'cosine'"),
        ("model", "coatnet0", "model = 'coatnet0': must be a JSON object"),
        ("model.resolution", 225, "nearest valid: 224"),
        ("optim.lr", float("nan"), "NaN"),
        ("optim.lr", float("inf"), "Infinity"),
        ("optim.weight_decay", 10**400, "must be a finite number"),
    ],
)
def test_reading_is_strict_and_names_the_field(path: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        from_json(broken(path, value))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"seed": 1, "seed": 2}', "[" * 100_000, "1" * 5000, '{"seed": 1e999}']
)
def test_what_is_no_run_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        from_json(text)


@given(st.text())
def test_only_our_own_error_comes_out_of_any_text(text: str) -> None:
    with pytest.raises(InputError):
        from_json(text)


def test_a_record_of_an_older_release_takes_defaults_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    run = load("coatnet4-in21k-224")
    path.write_text(to_json(run))
    assert recorded(path) == run
    assert capsys.readouterr().err == ""
    document = json.loads(to_json(run))
    del document["optim"]["ema"], document["evaluate"]
    path.write_text(json.dumps(document))
    assert recorded(path) == replace(run, optim=replace(run.optim, ema=Optim().ema), evaluate=Run().evaluate)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{path}: written by an older release; at their defaults: optim.ema, evaluate"
    with pytest.raises(InputError, match="missing"):
        from_json(path.read_text())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (to_json(Run())[:-40].encode(), "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{}", "names no recipe"),
        (b"[]", "must be a JSON object"),
        (broken("optim.lrr", 1.0).encode(), "did you mean 'optim.lr'"),
        (broken("optim.lr", -1.0).encode(), "optim.lr = -1.0"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_record_is_refused_by_name(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        recorded(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
