"""The paper's study: layouts of one size, the ablations' changes, and that each of them is a network that learns."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import resolve
from configs.errors import InputError
from configs.schema import Model
from models import coatnet, cost, spec
from models.coatnet import CoAtNet
from models.spec import Spec

LAYOUTS = ["C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "ViT_rel"]
KINDS = {"C": "mbconv", "T": "transformer"}
NANO = "coatnet-nano"
CHANGES: dict[str, dict[str, Any]] = {
    "no relative bias": {"relative_bias": "none"},
    "bias after the softmax": {"relative_bias": "post"},
    "heads of 8": {"head_size": 8},
    "heads of 32": {"head_size": 32},
    "LayerNorm": {"conv_norm": "layer"},
    "more attention": {"depths": (2, 1, 1, 4, 1)},
    "more convolution": {"depths": (2, 1, 3, 2, 1)},
    "depthwise stride": {"stride": "depthwise"},
    "all at once": {"relative_bias": "post", "head_size": 32, "conv_norm": "layer", "stride": "depthwise"},
}


def made(which: Spec) -> CoAtNet:
    model = coatnet.build(which, resolution=64, classes=10)
    coatnet.initialise(model, 0, "cpu")
    return model


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 64, 64, generator=generator), torch.arange(8)


def narrow(name: str) -> Spec:
    """The layout with a quarter of its width."""
    which = spec.get(name)
    stages = tuple(replace(stage, width=stage.width // 4) for stage in which.stages)
    return replace(which, stages=stages, head_size=8, kernel_std=0.05)


def assert_learns(which: Spec) -> None:
    """Three steps of AdamW on one batch: every parameter has a gradient, and the loss falls from step to step."""
    model, (x, labels) = made(which), pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        torch.autograd.backward(loss)
        assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(F.cross_entropy(model(x), labels)))
    assert losses == sorted(losses, reverse=True), losses
    assert losses[-1] < 0.9 * losses[0]


def test_the_layouts_have_one_size() -> None:
    counts = [cost.count(spec.get(name)) for name in LAYOUTS]
    for sizes in ([count.parameters for count in counts], [count.multiply_adds for count in counts]):
        assert max(sizes) / min(sizes) < 1.06  # the study asks for 1.10


@pytest.mark.parametrize("name", LAYOUTS[:-1])
def test_a_layout_has_the_stages_of_its_name_and_the_papers_shape(name: str) -> None:
    stem, *stages = spec.get(name).stages
    assert (stem.name, stem.block, stem.depth, stem.stride) == ("s0", "stem", 2, 2)
    assert [(stage.name, stage.block) for stage in stages] == [
        (f"s{number}", KINDS[letter]) for number, letter in enumerate(name.split("-"), 1)
    ]
    # Table 3 and section 4.1: widths double from S1 on, the stem is no wider, S1 and S4 keep two blocks.
    assert [stage.width // stages[0].width for stage in stages] == [1, 2, 4, 8]
    assert stem.width <= stages[0].width
    assert (stages[0].depth, stages[3].depth) == (2, 2)
    assert spec.get(name).head_size == 32
    assert spec.get(name).total_stride == 32


def test_vit_rel_is_patches_and_transformer_blocks_of_one_width() -> None:
    which = spec.get("ViT_rel")
    blocks = which.blocks(224)
    assert [block.kind for block in blocks] == ["patches", *["transformer"] * which.stages[1].depth, "head"]
    assert {(block.width, block.grid) for block in blocks[:-1]} == {(448, (14, 14))}
    assert (which.head_size, which.total_stride) == (32, 16)
    model = made(narrow("ViT_rel"))
    assert model.pyramid == [(16, 112)]
    assert model.forward_features(pictures()[0]).shape == (8, 112, 4, 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns(name: str) -> None:
    assert_learns(narrow(name))


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_of_the_design_learns_and_changes_the_function(what: str) -> None:
    which = spec.of(Model(name=NANO, **CHANGES[what]))
    assert_learns(which)
    x, _ = pictures()
    with torch.no_grad():
        assert not torch.allclose(made(which)(x), made(spec.get(NANO))(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("name", [NANO, "coatnet2"])
def test_changed_networks_have_the_counted_parameters(name: str, what: str) -> None:
    which = spec.of(Model(name=name, **CHANGES[what]))
    model = coatnet.build(which, resolution=224, classes=1000)
    built = [(name, sum(weight.numel() for weight in block.parameters())) for name, block in model.flat]
    assert built == [(block.name, block.parameters) for block in cost.count(which).blocks]


def test_a_changed_network_has_no_published_figures() -> None:
    own = spec.get("coatnet2")
    assert spec.of(Model("coatnet2", head_size=32, depths=(2, 2, 6, 14, 2), relative_bias="pre")) == own
    assert spec.of(Model("coatnet2", head_size=64)) == replace(own, head_size=64, published=spec.Published())
    assert spec.of(Model("coatnet2", stride="depthwise")).published == own.published  # which has rows for both


@pytest.mark.parametrize("name", resolve.names())
def test_every_recipes_network_has_the_counted_parameters(name: str) -> None:
    run = resolve.load(name)
    which = spec.of(run.model)
    model = coatnet.build(which, resolution=run.model.resolution, classes=1000, drop_path=run.model.drop_path)
    built = sum(weight.numel() for weight in model.parameters())
    assert built == cost.count(which, run.model.resolution).parameters
    assert max(model.drop_rates) < run.model.drop_path or run.model.drop_path == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Model("coatnet2", head_size=48),
            "model.head_size = 48: must divide the width 512 of stage s3 of coatnet2; nearest valid: 32",
        ),
        (Model("C-C-C-T", head_size=512), "must divide the width 768 of stage s4 of C-C-C-T; nearest valid: 128"),
        (Model("ViT_rel", head_size=128), "must divide the width 448 of stage s1 of ViT_rel; nearest valid: 64"),
        (
            Model("coatnet2", depths=(2, 2, 6, 14)),
            "model.depths = (2, 2, 6, 14): must be the blocks of each stage (s0, s1, s2, s3, s4) of coatnet2, at least "
            "1, the first 2; its own: (2, 2, 6, 14, 2)",
        ),
        (Model("coatnet2", depths=(2, 2, 0, 14, 2)), "model.depths = (2, 2, 0, 14, 2): must be"),
        (Model("coatnet2", depths=(3, 2, 6, 14, 2)), "the first 2; its own: (2, 2, 6, 14, 2)"),
        (Model("ViT_rel", depths=(2, 10)), "each stage (s0, s1) of ViT_rel, at least 1, the first 1; its own: (1, 10)"),
        (Model("ViT-rel"), "unknown model 'ViT-rel'; did you mean 'ViT_rel'"),
        (Model("C-C-T"), "unknown model 'C-C-T'; did you mean 'C-C-"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(model: Model, message: str) -> None:
    with pytest.raises(InputError) as refused:
        spec.of(model)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["study-vit-rel-in1k-224"],  # at its own width; it has no BatchNorm
        ["ablation-layer-norm-in1k-224", "--model.name", NANO],
    ],
)
def test_the_real_road_trains_it(words: list[str], repository: Path, tmp_path: Path) -> None:
    small = ["--data.synthetic", "--data.synthetic-classes", "10", "--steps", "2", "--model.resolution", "64"]
    small += ["--data.global-batch", "4", "--norm.replica-batch", "4", "--data.workers", "0"]
    small += ["--cluster.device", "cpu", "--cluster.ranks", "1", "--tracking.no-mlflow", "--runs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.cli", "train", *words, *small]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "at step 0 of 2" in done.stdout + done.stderr
    assert f"{words[0]}-synthetic  step 2/2" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Model(name="ViT_rel", conv_norm="layer"), "model.conv_norm = 'layer': ViT_rel has no mbconv blocks"),
        (Model(name="ViT_rel", stride="depthwise"), "model.stride = 'depthwise': ViT_rel has no mbconv blocks"),
        (Model(name="C-C-C-C", head_size=64), "model.head_size = 64: C-C-C-C has no transformer blocks"),
        (Model(name="C-C-C-C", attention="sdpa"), "model.attention = 'sdpa': C-C-C-C has no transformer blocks"),
        (Model(name="C-C-C-C", bias_lookup="einsum"), "model.bias_lookup = 'einsum': C-C-C-C has no transformer"),
    ],
)
def test_a_setting_without_effect_is_refused(model: Model, said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec.of(model)
