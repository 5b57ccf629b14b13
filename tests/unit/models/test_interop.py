"""Our weight file: what is written is what is read, it needs no name, and whatever is wrong is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import InputError
from models import card as cards
from models import coatnet, hub_folder, interop, spec
from models.card import Card, Preprocessing
from models.compare import check_fit
from models.interop import Weights
from models.resize import resize_table
from models.timm_design import read_any

NANO = spec.get("coatnet-nano")
CARD = Card(
    NANO, (64, 64), 3, ("cat", "dog", "m\u00f6we"), "ema", 700, "demo", "0123456789ab", {"top1": 0.9},
    Preprocessing((0.5, 0.5, 0.5), (0.25, 0.5, 0.5), "squash", 1.0), {"torch": "2.14"}, "CC0-1.0",
)  # fmt: skip
TABLE = "blocks.s3.0.attention.table"
WEIGHT = "blocks.s2.1.expand.weight"


def weights_of(card: Card = CARD, seed: int = 0) -> Weights:
    """Random weights and running statistics for a card."""
    model = interop.network(card)
    coatnet.initialise(model, seed, "cpu")
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, tensor in state.items():
        if "running" in name:
            tensor.copy_(1 + torch.rand(tensor.shape, generator=generator))
    return Weights(card, state)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "nano.safetensors"
    interop.write(path, weights_of())
    return path


def same(a: Weights, b: Weights) -> bool:
    return a.card == b.card and a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items()
    )  # fmt: skip


def damaged(
    stored: Path, change: Callable[[dict[str, Tensor]], object], header: Callable[[dict[str, Any]], object] = len
) -> Path:
    """The file with changed tensors or a changed card."""
    tensors, card = load_file(stored), json.loads(cards.to_json(CARD))
    change(tensors)
    header(card)
    save_file(tensors, stored, {interop.HEADER: json.dumps(card)})
    return stored


def test_round_trip_is_bitwise(stored: Path, tmp_path: Path) -> None:
    read = interop.read(stored)
    assert same(read, weights_of())
    again = tmp_path / "deep" / "again.safetensors"
    interop.write(again, read)
    assert again.read_bytes() == stored.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["again.safetensors"]


def test_the_same_through_timms_names(stored: Path, tmp_path: Path) -> None:
    interop.write(tmp_path / "timm.safetensors", weights_of(), names="timm")
    assert "stem.conv1.weight" in load_file(tmp_path / "timm.safetensors")
    interop.write(tmp_path / "back.safetensors", read_any(tmp_path / "timm.safetensors"))
    assert (tmp_path / "back.safetensors").read_bytes() == stored.read_bytes()


@pytest.mark.parametrize("name", list(spec.SPECS))
def test_the_card_rebuilds_every_network_without_its_name(name: str) -> None:
    named = spec.get(name)
    card = Card(replace(named, name="nobody-knows-it"), named.size(named.total_stride * 2), 3)
    back = cards.from_json(cards.to_json(card))
    assert replace(back.spec, name=name, published=named.published) == named
    model = coatnet.build(named, resolution=card.resolution, classes=3)
    assert interop.shapes(back) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_a_network_is_loaded_for_evaluation_and_draws_no_random_number(stored: Path) -> None:
    state = torch.random.get_rng_state()
    model = interop.load_model(stored)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert same(Weights(CARD, model.state_dict()), weights_of())
    model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("resolution", [32, 96, (64, 128)])
def test_another_resolution_resizes_the_tables_and_nothing_else(stored: Path, resolution: Any) -> None:
    model, before = interop.load_model(stored, resolution), weights_of().tensors
    for name, tensor in model.state_dict().items():
        if name.endswith("table"):
            assert tensor.shape != before[name].shape
            assert torch.equal(tensor, resize_table(before[name], *tensor.shape[1:]))
        else:
            assert torch.equal(tensor, before[name])
    height, width = NANO.size(resolution)
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 3)


def test_what_is_there_is_not_replaced_unasked(stored: Path) -> None:
    content = stored.read_bytes()
    with pytest.raises(InputError, match="is there already; --force"):
        interop.write(stored, weights_of(seed=1))
    assert stored.read_bytes() == content
    interop.write(stored, weights_of(seed=1), force=True)
    assert stored.read_bytes() != content


@pytest.mark.parametrize("ending", [".bin", ".pth"])
def test_no_file_is_written_that_would_be_refused_as_a_pickle(ending: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{ending} is a pickle's; nearest valid: .*nano.safetensors"):
        interop.write(tmp_path / f"nano{ending}", weights_of())
    assert not list(tmp_path.iterdir())


def test_weights_may_be_read_by_whom_other_files_may(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert stored.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_keeps_its_weights_if_the_new_ones_are_not_finite(tmp_path: Path) -> None:
    hub_folder.write(tmp_path, weights_of())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    weights = weights_of(seed=1)
    bad = Weights(weights.card, {**weights.tensors, WEIGHT: weights.tensors[WEIGHT] * float("nan")})
    with pytest.raises(InputError, match=f"{WEIGHT} has .* not finite"):
        hub_folder.write(tmp_path, bad, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda state: state.pop(WEIGHT), f"has no tensor {WEIGHT}"),
    "extra": (lambda state: state.update(stray=torch.zeros(1)), "tensor stray belongs to no coatnet-nano"),
    "shape": (lambda state: state.update({WEIGHT: torch.zeros(5, 5)}), rf"{WEIGHT} has shape \(5, 5\), must be \(128"),
    "table": (
        lambda state: state.update({TABLE: torch.zeros(4, 9, 9)}),
        rf"{TABLE} has shape \(4, 9, 9\), must be \(4, 7, 7\); it fits no grid",
    ),
    "classes": (
        lambda state: state.update({interop.CLASSIFIER + "weight": torch.zeros(7, 96)}),
        r"classifier.weight has shape \(7, 96\), must be \(3, 96\); the number of classes differs; --head reset",
    ),
    "half": (lambda state: state.update({WEIGHT: state[WEIGHT].half()}), f"{WEIGHT} holds torch.float16"),
    "whole numbers": (lambda state: state.update({WEIGHT: state[WEIGHT].int()}), f"{WEIGHT} holds torch.int32"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_wrong_tensor_is_named(what: str, stored: Path) -> None:
    change, message = BAD_TENSORS[what]
    with pytest.raises(InputError, match=message):
        interop.read(damaged(stored, change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, stored: Path, tmp_path: Path) -> None:
    def poison(state: dict[str, Tensor]) -> None:
        state[WEIGHT][3, 1] = value

    damaged(stored, poison)
    for use in (interop.load_model, lambda path: interop.write(tmp_path / "out", interop.read(path))):
        with pytest.raises(InputError, match=f"{WEIGHT} has 1 of 4096 values that are not finite"):
            use(stored)
    assert not (tmp_path / "out").exists()


def stages(card: dict[str, Any]) -> Any:
    return card["spec"]["stages"]


BAD_CARDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda card: card.update(format=2), "format 2, this program reads 1"),
    "unknown": (lambda card: card.update(colour=1), "unknown field 'card.colour'"),
    "missing": (lambda card: card.pop("spec"), "card.spec: missing"),
    "type": (lambda card: card.update(classes="three"), "card.classes = 'three'"),
    "deeper": (lambda card: stages(card)[2].update(depth=3), "has no tensor blocks.s2.2.depthwise.weight"),
    "bomb": (lambda card: stages(card)[2].update(depth=1_000_000), "more blocks than the file's"),
    "huge": (lambda card: stages(card)[2].update(width=1 << 40), "s2.width = 1099511627776"),
    "head": (lambda card: card["spec"].update(head_size=7), "describes no network.*head size 7 must divide"),
    "no head": (lambda card: card["spec"].update(head_size=0), "spec.head_size = 0"),
    "kind": (lambda card: stages(card)[1].update(block="lstm"), "block = 'lstm'"),
    "resolution": (lambda card: card.update(resolution=[64, 50]), "resolution = 50: must be a positive multiple of 32"),
    "far": (lambda card: card.update(resolution=[64, 10**30]), f"width = {10**30}"),
    "labels": (lambda card: card.update(labels=["a"]), "1 labels for 3 classes"),
    "names": (lambda card: card.update(names="timm"), "has no tensor stem.conv1.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CARDS)
def test_a_wrong_card_is_refused(what: str, stored: Path) -> None:
    change, message = BAD_CARDS[what]
    with pytest.raises(InputError, match=message) as caught:
        interop.read(damaged(stored, lambda _: None, change))
    assert str(stored) in str(caught.value)


def test_a_damaged_file_is_refused_wherever_it_is_cut_or_changed(stored: Path) -> None:
    content = stored.read_bytes()
    for cut in (0, 7, 100, 4000, len(content) - 1):
        stored.write_bytes(content[:cut])
        with pytest.raises(InputError, match="no intact safetensors file"):
            interop.read(stored)
    stored.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(InputError, match="no intact safetensors file"):
        interop.read(stored)


def test_other_files_are_refused_with_what_to_do(stored: Path, tmp_path: Path) -> None:
    save_file(load_file(stored), tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match=r"has no model card.*coatnet import"):
        interop.read(tmp_path / "bare.safetensors")
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"model.pth: is a pickle.*save_file"):
        interop.read(tmp_path / "model.pth")
    (tmp_path / "folder").mkdir()
    torch.save({}, tmp_path / "folder" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: is a pickle"):
        interop.read(tmp_path / "folder")
    with pytest.raises(InputError, match="no such file"):
        interop.read(tmp_path / "nothing.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"run: is a run folder; `coatnet export .*run` writes its weights"):
        interop.read(tmp_path / "run")


def test_a_fresh_classifier_replaces_the_old_and_nothing_else(stored: Path) -> None:
    before = interop.read(stored)
    after = interop.reset_classifier(before, 5)
    assert (after.card.classes, after.card.labels, after.card.metrics) == (5, (), {})
    changed = [name for name, tensor in after.tensors.items() if not torch.equal(tensor, before.tensors[name])]
    assert sorted(changed) == [interop.CLASSIFIER + "bias", interop.CLASSIFIER + "weight"]
    fresh = weights_of(replace(CARD, classes=5, labels=())).tensors[interop.CLASSIFIER + "weight"]
    assert torch.equal(after.tensors[interop.CLASSIFIER + "weight"], fresh)


def test_filling_names_what_does_not_fit() -> None:
    weights = weights_of()
    model = interop.network(CARD)
    coatnet.initialise(model, 1, "cpu")
    partial = {name: tensor for name, tensor in weights.tensors.items() if name != WEIGHT}
    with pytest.raises(InputError, match=f"x: has no tensor {WEIGHT}"):
        interop.fill(model, partial.items(), "x")
    with pytest.raises(InputError, match="tensor stray is unknown"):
        interop.fill(model, [("stray", torch.zeros(1))], "x")
    with pytest.raises(InputError, match=f"{TABLE} has shape .3, 7, 7., must be .4, 7, 7."):
        interop.fill(model, {**weights.tensors, TABLE: torch.zeros(3, 7, 7)}.items(), "x")
    kept = model.state_dict()[interop.CLASSIFIER + "weight"].clone()
    interop.fill(model, weights_of(replace(CARD, classes=9, labels=())).tensors.items(), "x", "reset")
    assert torch.equal(model.state_dict()[interop.CLASSIFIER + "weight"], kept)
    assert torch.equal(model.state_dict()[WEIGHT], weights.tensors[WEIGHT])


def test_another_design_is_named_difference_by_difference() -> None:
    wide = tuple(replace(stage, width=48) if stage.name == "s2" else stage for stage in NANO.stages)
    other = replace(NANO, name="other", stages=wide, head_size=32, stride="depthwise")
    with pytest.raises(InputError) as caught:
        check_fit(CARD, other, CARD.labels, "here.safetensors", "keep", "--init.head reset")
    for text in (
        "here.safetensors: holds coatnet-nano, which is not the other",
        "s2 is 2 mbconv of width 32, stride 2 there, 2 mbconv of width 48, stride 2 here",
        "head_size is 16 there, 32 here",
        "stride is expansion there, depthwise here",
        "first tensor that differs: blocks.s2.0.depthwise.weight (128, 1, 3, 3) there, (192, 1, 3, 3) here",
    ):
        assert text in str(caught.value)
    check_fit(CARD, replace(NANO, name="other", kernel_std=0.5), CARD.labels, "x", "keep", "")


def test_other_classes_need_a_fresh_classifier() -> None:
    weight = "blocks.head.0.classifier.weight"
    with pytest.raises(InputError, match=rf"{weight} has 3 classes, 2 are wanted; --init.head reset replaces"):
        check_fit(CARD, NANO, ("cat", "dog"), "x", "keep", "--init.head reset")
    with pytest.raises(InputError, match=r"number 1 is 'dog' there and 'fox' here; --init.head reset replaces"):
        check_fit(CARD, NANO, ("cat", "fox", "m\u00f6we"), "x", "keep", "--init.head reset")
    check_fit(CARD, NANO, ("cat", "dog"), "x", "reset", "")
    check_fit(replace(CARD, labels=()), NANO, ("a", "b", "c"), "x", "keep", "")


def part_of(first: int, last: int, resolution: int = 64) -> coatnet.CoAtNet:
    model = coatnet.build(NANO, resolution=resolution, classes=3)
    model.cut(first, last)
    coatnet.initialise(model, 1, "cpu")
    return model


@pytest.mark.parametrize("ends", [(0, 3, 6, 9), (0, 1, 9)])
@pytest.mark.parametrize("resolution", [64, 96])
def test_parts_of_a_network_take_their_own_weights(ends: tuple[int, ...], resolution: int) -> None:
    weights = weights_of()
    whole = coatnet.build(NANO, resolution=resolution, classes=3)
    coatnet.initialise(whole, 2, "cpu")
    interop.fill(whole, weights.tensors.items(), "file")
    found: dict[str, Tensor] = {}
    for first, last in pairwise(ends):
        part = part_of(first, last, resolution)
        interop.fill(part, weights.tensors.items(), "file")
        found |= part.state_dict()
    assert list(found) == list(whole.state_dict())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found[name], tensor), name
        assert resolution == 96 or torch.equal(tensor, weights.tensors[name])


def test_a_part_misses_only_its_own_weights() -> None:
    weights = weights_of().tensors
    without = {name: tensor for name, tensor in weights.items() if name != TABLE}
    interop.fill(part_of(0, 3), without.items(), "file")
    with pytest.raises(InputError, match=f"has no tensor {TABLE}"):
        interop.fill(part_of(3, 9), without.items(), "file")
    with pytest.raises(InputError, match=r"tensor blocks\.s7\.0\.x is unknown"):
        interop.fill(part_of(0, 3), {**weights, "blocks.s7.0.x": torch.zeros(1)}.items(), "file")
    broken = {**weights, TABLE: weights[TABLE] * torch.nan}
    interop.fill(part_of(0, 3), broken.items(), "file")  # the part that takes it says so
    with pytest.raises(InputError, match=TABLE):
        interop.fill(part_of(3, 9), broken.items(), "file")


def test_a_fresh_classifier_concerns_the_last_part_alone() -> None:
    weights = weights_of().tensors
    first, last = part_of(0, 5), part_of(5, 9)
    before = last.get_parameter("blocks.head.0.classifier.weight").clone()
    for part in (first, last):
        interop.fill(part, weights.items(), "file", "reset")
    assert torch.equal(last.get_parameter("blocks.head.0.classifier.weight"), before)
    assert torch.equal(last.get_parameter("blocks.head.0.hidden.weight"), weights["blocks.head.0.hidden.weight"])
    assert torch.equal(first.get_parameter(WEIGHT), weights[WEIGHT])
