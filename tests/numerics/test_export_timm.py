"""What is exported for timm computes the same logits in timm, loaded by its own loaders; and its own files come in.

The mapping of names is checked by function here, and against its independent twin in test_timm_parity.py.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.models._hub import save_for_hf
from torch import Tensor

from configs.errors import InputError
from models import coatnet, hub_folder, interop, spec, timm_names
from models.card import Card, Preprocessing
from models.design import Spec
from models.interop import Weights
from models.timm_design import read_any

NANO = spec.get("coatnet-nano")
LABELS = ("cat", "dog", "m\u00f6we")


def small(which: Spec) -> Spec:
    """The same design with the widths of nano, where kernels of its size keep the signal alive."""
    widths = (16, 16, 32, 64, 96)
    stages = tuple(replace(stage, width=width) for stage, width in zip(which.stages, widths, strict=True))
    return replace(which, stages=stages, head_size=which.head_size // 4, kernel_std=NANO.kernel_std)


def laid_out(kinds: str) -> Spec:
    """Nano with C or T for stages S1 to S4."""
    blocks = {"C": "mbconv", "T": "transformer"}
    stages = [replace(stage, block=blocks[kind]) for stage, kind in zip(NANO.stages[1:], kinds, strict=True)]  # type: ignore[arg-type]
    return replace(NANO, name=kinds, stages=(NANO.stages[0], *stages))


DESIGNS = {name: small(spec.get(name)) for name in ("coatnet0", "coatnet2", "coatnet3-dagger", "coatnet4", "coatnet5")}
DESIGNS |= {"nano": NANO} | {kinds: laid_out(kinds) for kinds in ("CCCC", "CCCT", "CTTT", "TTTT")}
DESIGNS |= {"no bias": replace(NANO, relative_bias="none"), "other ratios": replace(NANO, expansion=2, se_ratio=0.5)}


def random_weights(which: Spec, resolution: tuple[int, int] = (64, 64)) -> Weights:
    """Weights, biases and running statistics that all matter."""
    seen = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "center", 0.9)
    card = Card(which, resolution, 3, LABELS, "ema", 5, "demo", "abc", {"top1": 0.5}, seen, {"torch": "2"}, "mit")
    model = interop.network(card)
    coatnet.initialise(model, 0, "cpu")
    state = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("bias") or "running" in name or (name.endswith("weight") and tensor.dim() == 1):
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return Weights(card, state)


def logits(model: torch.nn.Module, resolution: tuple[int, int] = (64, 64)) -> Tensor:
    pictures = torch.randn(2, 3, *resolution, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        result: Tensor = model.double().eval()(pictures)
    return result


def agree(ours: Tensor, theirs: Tensor) -> bool:
    assert float(ours.std()) > 1e-3  # else any network would agree
    return float((ours - theirs).abs().max()) < 1e-10


@pytest.mark.parametrize("name", DESIGNS)
def test_timm_loads_the_folder_offline_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    weights = random_weights(DESIGNS[name])
    hub_folder.write(tmp_path / "model", weights)
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert agree(logits(interop.load_model(tmp_path / "model")), logits(theirs))
    found = theirs.pretrained_cfg
    assert tuple(found["mean"]) == weights.card.preprocessing.mean
    assert tuple(found["std"]) == weights.card.preprocessing.std
    assert (found["crop_pct"], found["interpolation"], found["license"]) == (0.9, "bicubic", "mit")
    assert (tuple(found["label_names"]), found["num_classes"], tuple(found["input_size"])) == (LABELS, 3, (3, 64, 64))


@pytest.mark.parametrize("size", range(6))
def test_every_tensor_of_the_models_at_their_size_has_its_place_in_timm(size: int) -> None:
    which = spec.get(f"coatnet{size}")
    with torch.device("meta"):
        theirs = timm.create_model(
            timm_names.architecture(which), **timm_names.arguments(which, (224, 224))
        ).state_dict()
    ours = coatnet.build(which, resolution=224, classes=1000).state_dict()
    moved = timm_names.to_timm(ours, which)
    assert {name: tensor.shape for name, tensor in moved.items()} == {name: t.shape for name, t in theirs.items()}


def test_a_single_file_loads_strictly_at_a_size_that_is_not_square(tmp_path: Path) -> None:
    weights = random_weights(NANO, (96, 64))
    interop.write(tmp_path / "timm.safetensors", weights, names="timm")
    theirs = timm.create_model(
        timm_names.architecture(NANO), num_classes=3, **timm_names.arguments(NANO, weights.card.resolution)
    )
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    ours = interop.load_model(tmp_path / "timm.safetensors")
    assert agree(logits(ours, (96, 64)), logits(theirs, (96, 64)))
    other = random_weights(NANO)
    interop.write(tmp_path / "square.safetensors", other, names="timm")
    theirs = timm.create_model(timm_names.architecture(NANO), num_classes=3, **timm_names.arguments(NANO, (64, 64)))
    load_checkpoint(theirs, str(tmp_path / "square.safetensors"))
    assert agree(logits(interop.load_model(tmp_path / "square.safetensors")), logits(theirs))


@pytest.mark.parametrize("name", DESIGNS)
def test_a_model_that_timm_saved_comes_in_bitwise(name: str, tmp_path: Path) -> None:
    which = DESIGNS[name]
    weights = random_weights(which)
    hub_folder.write(tmp_path / "ours", weights)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True)
    save_for_hf(theirs, str(tmp_path / "theirs"), safe_serialization=True)
    assert "coatnet" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    back = read_any(tmp_path / "theirs")
    assert back.tensors.keys() == weights.tensors.keys()
    for tensor_name, tensor in weights.tensors.items():
        assert torch.equal(back.tensors[tensor_name], tensor), tensor_name
    card = back.card
    assert (card.classes, card.labels, card.resolution, card.preprocessing) == (
        3, LABELS, (64, 64), weights.card.preprocessing,
    )  # fmt: skip
    # As long as timm says what it was built from, the design is the same to the last field.
    assert replace(card.spec, name="", kernel_std=0.0) == replace(
        which, name="", kernel_std=0.0, published=card.spec.published
    )


def theirs_in(folder: Path, name: str = "coatnet_0_224", **arguments: Any) -> Path:
    """A small model of timm's, saved by timm."""
    sizes: dict[str, Any] = {
        "embed_dim": (16, 32, 64, 96),
        "depths": (1, 2, 3, 1),
        "transformer_dim_head": 16,
        "num_classes": 3,
    }
    sizes |= {"img_size": 64, "head_hidden_size": 96} | arguments
    model = timm.create_model(name, **sizes)
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def test_timms_own_paper_like_design_is_refused_with_every_difference(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_any(theirs_in(tmp_path / "model", stem_width=16))
    for text in (
        "coatnet_0_224 is not this project's CoAtNet",
        "stem_bias is False there, ours is True",
        "conv_pool_type is 'avg2' there, ours is 'max2'",
        "conv_act_layer is 'gelu' there, ours is 'gelu_tanh'",
        "conv_norm_eps is 1e-05 there, ours is 0.001",
        "transformer_pool_type is 'avg2' there, ours is 'max2'",
        "transformer_act_layer is 'gelu' there, ours is 'gelu_tanh'",
        "transformer_norm_eps is 1e-06 there, ours is 1e-05",
    ):
        assert text in str(caught.value)
    assert str(caught.value).count(" there, ours is ") == 7  # and nothing that does not differ


def test_other_models_of_timm_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embed_dim": (16, 16, 32, 32), "stem_width": (8, 16), "head_hidden_size": None}
    with pytest.raises(InputError) as caught:
        read_any(theirs_in(tmp_path / "rw", "coatnet_rmlp_1_rw_224", **sizes))
    for text in ("stem_width is (8, 16)", "rel_pos_type is 'mlp'", "pre_norm_act is True", "head_hidden_size is None"):
        assert text in str(caught.value)
    (tmp_path / "rw" / "config.json").write_text('{"architecture": "resnet50", "pretrained_cfg": {}}')
    with pytest.raises(InputError, match=r"unknown timm CoAtNet in .*'resnet50'"):
        read_any(tmp_path / "rw")
    (tmp_path / "rw" / "config.json").unlink()
    with pytest.raises(InputError, match=r"no model card and no config.json beside it"):
        read_any(tmp_path / "rw")


def test_without_timm_its_weights_are_refused_and_ours_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_folder.write(tmp_path / "ours", random_weights(NANO))
    theirs_in(tmp_path / "theirs", stem_width=16)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    assert read_any(tmp_path / "ours").card.spec.name == "coatnet-nano"
    with pytest.raises(InputError, match=r"timm is not installed: pip install -e '\.\[timm\]'"):
        read_any(tmp_path / "theirs")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no object": ({"model_args": [1]}, "describes no model"),
    "unknown argument": ({"model_args": {"conv_pol_type": "max2"}}, "did you mean 'conv_pool_type'"),
    "text": ({"model_args": {"embed_dim": "wide"}}, "describes no model|is not this project's"),
    "labels": ({"label_names": ["a"]}, "1 labels for 3 classes"),
    "channels": ({"model_args": {"in_chans": 1}}, "in_chans is 1, must be 3"),
    "pool": ({"global_pool": "max"}, "global_pool is 'max', must be 'avg'"),
    "classes": ({"num_classes": 4, "label_names": []}, r"head.fc.weight has shape \(3, 96\), which is no \(4, 96\)"),
    "infinite": ({"num_classes": float("inf")}, "describes no model"),
    "size": ({"model_args": {"img_size": 100}}, "resolution = 100: must be a positive multiple of 32"),
    "tables": ({"model_args": {"img_size": 96}}, r"relative_position_bias_table has shape \(49, 4\)"),
    "depth": ({"model_args": {"depths": [1, 2, 4, 1]}}, "has no tensor stages.2.blocks.3"),
    "shallow": ({"model_args": {"depths": [1, 2, 2, 1]}}, "tensor stages.2.blocks.2.attn.proj.bias belongs to no"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_wrong_description_is_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, message = BAD_CONFIGS[what]
    hub_folder.write(tmp_path, random_weights(NANO))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")  # without the card, so that config.json counts
    document = json.loads((tmp_path / "config.json").read_text())
    assert read_any(tmp_path).card.spec.name == "coatnet-nano"
    for name, value in changes.items():
        mergeable = isinstance(value, dict)
        document[name] = {**document[name], **value} if mergeable else value
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        read_any(tmp_path)


@pytest.mark.parametrize("name", ["coatnet6", "coatnet7", "coatnet6-table12"])
def test_what_timm_cannot_express_is_said_and_not_claimed(name: str) -> None:
    which = spec.get(name)
    with pytest.raises(InputError, match=f"timm cannot express {name}: stride 1 of s3b"):
        timm_names.arguments(which, (224, 224))
    card = Card(which, (224, 224), 3)
    assert "timm" not in json.dumps(hub_folder.config(card))
    assert "timm" not in hub_folder.readme(card)


def test_a_folder_that_timm_cannot_express_loads_by_ours(tmp_path: Path) -> None:
    which = replace(NANO, relative_bias="post")
    hub_folder.write(tmp_path / "model", random_weights(which))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(hub_folder.FILES)
    model = interop.load_model(tmp_path / "model")
    assert model.spec.relative_bias == "post"
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    with pytest.raises(InputError, match="--force"):
        hub_folder.write(tmp_path / "model", random_weights(which))
