"""The network equals a plain second implementation in float64: outputs, every gradient, running statistics."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from configs.schema import Model
from models import coatnet, norm, spec
from models.coatnet import CoAtNet
from models.spec import ConvNorm, RelativeBias, Resolution, Spec, Stage, Stride
from tests.numerics.reference import (
    STUDY,
    TABLE,
    Description,
    Kind,
    Row,
    State,
    Statistics,
    narrow,
    reference_forward,
    shapes,
)

CLASSES, MOMENTUM = 7, 0.1
AnyBias = Literal["auto", "pre", "post", "none"]
DIVISORS = dict.fromkeys(TABLE, 32) | {"coatnet0": 16, "coatnet1": 16, "coatnet2": 16} | dict.fromkeys(STUDY, 8)
KINDS: dict[Kind, Literal["stem", "patches", "mbconv", "transformer"]] = {
    "stem": "stem",
    "patches": "patches",
    "C": "mbconv",
    "T": "transformer",
}


def small(name: str) -> Spec:
    """A paper model at its own depth with narrow stages and heads of 8 channels."""
    which = spec.get(name)
    stages = tuple(replace(stage, width=stage.width // DIVISORS[name]) for stage in which.stages)
    return replace(which, stages=stages, head_size=8)


def described(description: Description) -> Spec:
    """The spec of a network that the paper has no row for."""
    stages = tuple(
        Stage(name, KINDS[kind], depth, width, step) for name, kind, depth, width, step in description.stages
    )
    return Spec(
        "described",
        stages,
        description.head_size,
        relative_bias=description.bias,
        conv_norm=description.conv_norm,
        stride=description.stride_in,
    )


def randomised(which: Spec, resolution: Resolution, stride: Stride | None) -> CoAtNet:
    """The network in float64 with no weight, bias, bias table or running statistic at its initial value."""
    model = coatnet.build(which, resolution=resolution, classes=CLASSES, stride=stride, norm_momentum=MOMENTUM)
    coatnet.initialise(model, 0, "cpu")
    model.double()
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 and "table" not in name else 0.3
        centre = 1.0 if tensor.dim() == 1 and name.endswith(("weight", "var")) else 0.0
        tensor.copy_(centre + spread * torch.rand_like(tensor).mul(2).sub(1))
    return model


def agree(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Equal to 1e-10 of the largest value; below 1e-12 all is rounding, as in the gradient of a bias before a norm."""
    assert ours is not None
    assert theirs is not None
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) <= 1e-12 + 1e-10 * float(theirs.abs().max())


def by_groups(
    state: State, description: Description, x: Tensor, training: bool, drop: Tensor | None, group: int
) -> tuple[Tensor, Statistics]:
    """The reference run on each group of samples by itself; statistics are means over the groups."""
    parts = [
        reference_forward(state, description, part, training, None if drop is None else drop[:, first : first + group])
        for first, part in zip(range(0, len(x), group), torch.split(x, group), strict=True)
    ]
    means = {
        name: (
            torch.stack([part.statistics[name][0] for part in parts]).mean(0),
            torch.stack([part.statistics[name][1] for part in parts]).mean(0),
        )
        for name in parts[0].statistics
    }
    return torch.cat([part.logits for part in parts]), means


def check(
    which: Spec,
    description: Description,
    training: bool,
    *,
    resolution: tuple[int, int] = (64, 64),
    batch: int = 3,
    drop: bool = False,
    group: int | None = None,
    stride: Stride | None = None,
) -> None:
    """Ours against the reference on random pictures: logits, gradients by name, running statistics."""
    model = randomised(which, resolution, stride).train(training)
    if group is not None:
        norm.configure(model, group=group)
    names = set(dict(model.named_parameters()))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in names:
        state[name].requires_grad_()
    x = torch.randn(batch, 3, *resolution, dtype=torch.float64)
    factors = None
    if drop:
        factors = torch.rand(len(model.drop_rates), batch, dtype=torch.float64) * 2
        factors[torch.rand_like(factors) < 0.2] = 0
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits = model(ours, factors)
    expected, statistics = by_groups(state, description, theirs, training, factors, group or batch)
    assert agree(logits, expected)
    weights = torch.randn_like(expected)
    torch.autograd.backward([(logits * weights).sum(), (expected * weights).sum()])
    assert agree(ours.grad, theirs.grad)
    for name, parameter in model.named_parameters():
        assert agree(parameter.grad, state[name].grad), name
    if not training:
        return
    norm.commit(model)
    moved = {name for name in model.state_dict() if name.endswith(("running_mean", "running_var"))}
    assert moved == {f"{name}.{leaf}" for name in statistics for leaf in ("running_mean", "running_var")}
    for name, new in statistics.items():
        for leaf, value in zip(("running_mean", "running_var"), new, strict=True):
            before = state[f"{name}.{leaf}"]
            assert agree(model.get_buffer(f"{name}.{leaf}"), before + MOMENTUM * (value - before)), name


@pytest.mark.parametrize("name", [*TABLE, *STUDY])
@pytest.mark.parametrize("resolution", [(224, 224), (384, 512)])
def test_parameters_have_the_papers_names_and_shapes(name: str, resolution: tuple[int, int]) -> None:
    built = coatnet.build(spec.get(name), resolution=resolution, classes=1000).named_parameters()
    expected = shapes((TABLE | STUDY)[name], resolution, 1000)
    assert {path: tuple(weight.shape) for path, weight in built} == expected


@pytest.mark.parametrize("depths", [(2, 2, 6, 14, 2), (2, 2, 2, 18, 2), (2, 2, 8, 12, 2)])
@pytest.mark.parametrize(("head_size", "bias"), [(32, "auto"), (64, "none")])
def test_a_run_changes_the_network_as_it_says(depths: tuple[int, ...], head_size: int, bias: AnyBias) -> None:
    run = Model(name="coatnet2", depths=depths, head_size=head_size, relative_bias=bias)
    widths = zip(TABLE["coatnet2"].stages, depths, strict=True)
    stages = tuple((stage, kind, depth, width, step) for (stage, kind, _, width, step), depth in widths)
    expected = Description(stages, head_size, bias="pre" if bias == "auto" else bias)
    built = coatnet.build(spec.of(run), resolution=224, classes=1000).named_parameters()
    assert {path: tuple(weight.shape) for path, weight in built} == shapes(expected, (224, 224), 1000)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(TABLE))
def test_every_model_is_its_formula(name: str, training: bool) -> None:
    check(small(name), narrow(TABLE[name], DIVISORS[name], 8), training, drop=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(TABLE))
def test_the_other_place_of_the_stride_is_its_formula(name: str, training: bool) -> None:
    other: Stride = "expansion" if spec.get(name).stride == "depthwise" else "depthwise"
    description = replace(narrow(TABLE[name], DIVISORS[name], 8), stride_in=other)
    check(small(name), description, training, stride=other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("resolution", [(32, 96), (96, 64)])
def test_pictures_need_not_be_square(resolution: tuple[int, int], training: bool) -> None:
    check(small("coatnet0"), narrow(TABLE["coatnet0"], 16, 8), training, resolution=resolution)


@pytest.mark.parametrize("name", ["coatnet0", "coatnet6"])
def test_groups_of_samples_are_normalised_apart(name: str) -> None:
    description = narrow(TABLE[name], DIVISORS[name], 8)
    check(small(name), description, training=True, batch=6, group=3, drop=True)


@pytest.mark.parametrize(
    ("stride", "training"),
    [
        ("expansion", True),
        ("depthwise", False),
        pytest.param("expansion", False, marks=pytest.mark.slow),
        pytest.param("depthwise", True, marks=pytest.mark.slow),
    ],
)
def test_coatnet0_at_224_is_its_formula(stride: Stride, training: bool) -> None:
    description = replace(TABLE["coatnet0"], stride_in=stride)
    check(spec.get("coatnet0"), description, training, resolution=(224, 224), batch=2 if training else 1, stride=stride)


def rows(layout: tuple[Kind, ...]) -> tuple[Row, ...]:
    """A small network whose stages after the stem are `layout`."""
    sizes = enumerate(zip(layout, (8, 16, 24, 32), strict=True), start=1)
    return ("s0", "stem", 2, 8, 2), *((f"s{number}", kind, 2, width, 2) for number, (kind, width) in sizes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layout", [("C", "C", "C", "C"), ("C", "C", "C", "T"), ("C", "C", "T", "T"), ("C", "T", "T", "T")]
)
def test_every_layout_of_the_study_is_its_formula(layout: tuple[Kind, ...], training: bool) -> None:
    description = Description(rows(layout), head_size=8)
    check(described(description), description, training, drop=True)


@pytest.mark.parametrize("name", list(STUDY))
def test_the_named_layouts_of_the_study_are_their_formulas(name: str) -> None:
    check(small(name), narrow(STUDY[name], DIVISORS[name], 8), training=True, drop=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_of_mbconv", ["batch", "layer"])
@pytest.mark.parametrize("bias", ["pre", "post", "none"])
def test_the_papers_ablations_are_their_formulas(bias: RelativeBias, norm_of_mbconv: ConvNorm, training: bool) -> None:
    description = replace(narrow(TABLE["coatnet0"], 16, 8), bias=bias, conv_norm=norm_of_mbconv)
    which = described(description)
    assert which.stages == small("coatnet0").stages
    check(which, description, training, drop=True)


@pytest.mark.parametrize("bias", ["pre", "post", "none"])
def test_vit_rel_is_its_formula(bias: RelativeBias) -> None:
    stages: tuple[Row, ...] = (("s0", "patches", 1, 24, 16), ("s1", "T", 3, 24, 1))
    description = Description(stages, head_size=8, bias=bias)
    check(described(description), description, training=False, resolution=(64, 96), drop=True)


@pytest.mark.parametrize("head_size", [4, 24])
def test_every_head_size_is_its_formula(head_size: int) -> None:
    description = narrow(TABLE["coatnet0"], 16, head_size)
    check(described(description), description, training=False)


@pytest.mark.parametrize("name", ["coatnet0", "coatnet7"])
@torch.no_grad()
def test_feature_maps_are_those_of_the_formula(name: str) -> None:
    model = randomised(small(name), (64, 96), None).eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps = reference_forward(model.state_dict(), narrow(TABLE[name], DIVISORS[name], 8), x, training=False).maps
    expected = [maps[stage] for stage in ("s1", "s2", "s3" if name == "coatnet0" else "s3b", "s4")]
    found = model.forward_pyramid(x)
    assert [64 // scale.shape[2] for scale in found] == [4, 8, 16, 32]
    assert all(agree(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert agree(model.forward_features(x), expected[-1])


def test_the_comparison_tells_close_designs_apart() -> None:
    model, right = randomised(small("coatnet0"), 64, None), narrow(TABLE["coatnet0"], 16, 8)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    logits = model(x)
    assert agree(logits, reference_forward(model.state_dict(), right, x, training=True).logits)
    for wrong in (
        replace(right, stride_in="depthwise"),
        replace(right, bias="post"),
        replace(right, bias="none"),
        replace(right, conv_norm="layer"),
        replace(right, head_size=24),
    ):
        assert not agree(logits, reference_forward(model.state_dict(), wrong, x, training=True).logits), wrong
