"""The recipes hold the paper's values: typed here again from its table 10, not read from the code."""

import re
from typing import Any

import pytest

from configs import resolve
from models import cost, spec
from trainer.commands.config import resolve_command

# drop path, loss, smoothing, epochs, peak lr, schedule, warm-up steps, warm-up epochs, weight decay, RandAugment, mixup
TABLE_10 = {
    "coatnet0-in1k-224": (0.2, "softmax", 0.1, 300, 0.001, "cosine", 10_000, 0, 0.05, (2, 15), 0.8),
    "coatnet2-in1k-224": (0.5, "softmax", 0.1, 300, 0.001, "cosine", 10_000, 0, 0.05, (2, 15), 0.8),
    "coatnet3-in21k-224": (0.5, "sigmoid", 0.0001, 90, 0.001, "linear", 0, 5, 0.01, (0, 0), 0.0),
    "coatnet4-in21k-224": (0.7, "sigmoid", 0.0001, 90, 0.001, "linear", 0, 5, 0.01, (2, 5), 0.0),
    "coatnet5-jft300m-224": (0.0, "sigmoid", 0.0001, 14, 0.0005, "linear", 20_000, 0, 0.01, (2, 5), 0.0),
}
# Section 2.2: 300 and 3 epochs without regularisation and augmentation.
LAYOUTS = {
    "C-C-C-C": "study-c-c-c-c",
    "C-C-C-T": "study-c-c-c-t",
    "C-C-T-T": "study-c-c-t-t",
    "C-T-T-T": "study-c-t-t-t",
    "ViT_rel": "study-vit-rel",
}
for stem in LAYOUTS.values():
    TABLE_10[f"{stem}-in1k-224"] = (0.0, "softmax", 0.0, 300, 0.001, "cosine", 10_000, 0, 0.0, (0, 0), 0.0)
    TABLE_10[f"{stem}-jft300m-224"] = (0.0, "sigmoid", 0.0, 3, 0.001, "linear", 20_000, 0, 0.0, (0, 0), 0.0)
TABLE_10["coatnet7-jft3b-224"] = TABLE_10["coatnet5-jft300m-224"]
MODELS = {
    "coatnet0-in1k-224": ("coatnet0", 1, "none"),
    "coatnet2-in1k-224": ("coatnet2", 1, "selective"),
    "coatnet3-in21k-224": ("coatnet3", 3, "full"),
    "coatnet4-in21k-224": ("coatnet4", 3, "full"),
    "coatnet5-jft300m-224": ("coatnet5", 3, "full"),
    "coatnet7-jft3b-224": ("coatnet7", 3, "full"),
}
for layout, stem in LAYOUTS.items():
    MODELS |= {f"{stem}-{data}-224": (layout, 1, "selective") for data in ("in1k", "jft300m")}

# Tables 6 to 8: (recipe, the recipe it is compared with, its only change, the figures that must be named).
ABLATIONS: list[tuple[str, str, tuple[str, Any, Any], str]] = [
    ("no-relative-bias-in1k", "coatnet2-in1k", ("relative_bias", "auto", "none"), "83.8 84.1"),
    ("post-softmax-bias-in1k", "coatnet2-in1k", ("relative_bias", "auto", "post"), "84.1"),
    ("head-size-64-in1k", "coatnet2-in1k", ("head_size", 0, 64), "83.9 84.1"),
    ("layer-norm-in1k", "coatnet2-in1k", ("conv_norm", "auto", "layer"), "84.1 84.1"),
    ("depths-2-2-2-18-2-in1k", "coatnet2-in1k", ("depths", (), (2, 2, 2, 18, 2)), "83.4 84.1"),
    ("depths-2-2-8-12-2-in1k", "coatnet2-in1k", ("depths", (), (2, 2, 8, 12, 2)), "84.0 84.1"),
    ("no-relative-bias-in21k", "coatnet3-in21k", ("relative_bias", "auto", "none"), "87.4 52.8 87.9 53.0"),
    ("layer-norm-in21k", "coatnet3-in21k", ("conv_norm", "auto", "layer"), "87.8 87.9"),
    ("depths-2-2-2-18-2-in21k", "coatnet3-in21k", ("depths", (), (2, 2, 2, 18, 2)), "87.4 53.0 87.6 53.0"),
]
IMAGES = {"in1k": 1_281_167, "in21k": 12.7e6, "jft300m": 300e6}


@pytest.mark.parametrize("name", TABLE_10)
def test_recipe_holds_the_papers_values(name: str) -> None:
    run = resolve.load(name)
    optim, augment = run.optim, run.augment
    assert (
        run.model.drop_path,
        optim.loss,
        optim.label_smoothing,
        optim.epochs,
        optim.lr,
        optim.schedule,
        optim.warmup_steps,
        optim.warmup_epochs,
        optim.weight_decay,
        (augment.randaugment_layers, augment.randaugment_magnitude),
        augment.mixup_alpha,
    ) == TABLE_10[name]
    assert (optim.min_lr, optim.clip_norm, optim.steps) == (1e-5, 1.0, 0)
    assert (run.data.global_batch, run.norm.replica_batch, run.norm.momentum) == (4096, 256, 0.01)
    assert (augment.crop, augment.cutmix_alpha) == ("random", 0.0)
    assert (run.model.resolution, run.model.stride) == (224, "auto")
    assert spec.of(run.model).stride == "expansion"


@pytest.mark.parametrize("name", MODELS)
def test_recipe_names_its_model_and_layout(name: str) -> None:
    run = resolve.load(name)
    assert (run.model.name, run.parallel.zero, run.parallel.recompute) == MODELS[name]


@pytest.mark.parametrize("name", resolve.names())
def test_recipe_says_what_to_expect_and_how_to_start(name: str) -> None:
    text = resolve.RECIPES[name].__doc__ or ""
    for heading in ("Source:", "Expected:", "Hardware, time, cost", f"Command: `coatnet train {name}"):
        assert heading in text
    assert resolve.load(name).recipe == name


def test_demo_has_two_batchnorm_groups_or_more_so_that_two_ranks_need_not_share_one() -> None:
    run = resolve.load("demo-digits")
    assert run.data.global_batch >= 2 * run.norm.replica_batch
    assert (run.model.name, run.precision.dtype, run.parallel.zero, run.parallel.recompute) == (
        "coatnet-nano",
        "fp32",
        3,
        "full",
    )
    assert not run.augment.flip


def test_clip_art_is_trained_as_the_paper_trains_on_jft() -> None:
    run = resolve.load("demo-clipart")
    optim, augment = run.optim, run.augment
    assert (optim.loss, optim.label_smoothing, optim.schedule, optim.weight_decay) == ("sigmoid", 1e-4, "linear", 0.01)
    assert (augment.randaugment_layers, augment.randaugment_magnitude, augment.mixup_alpha) == (2, 5.0, 0.0)
    assert run.data.global_batch >= 2 * run.norm.replica_batch  # two ranks need not share a BatchNorm group
    assert (run.model.name, run.parallel.zero, run.parallel.recompute) == ("coatnet-nano", 3, "full")
    assert optim.ema > 0


def test_unpublished_recipe_says_so() -> None:
    text = resolve.RECIPES["coatnet7-jft3b-224"].__doc__ or ""
    assert "publishes no hyper-parameters" in text


@pytest.mark.parametrize(("name", "base", "change", "figures"), ABLATIONS)
def test_an_ablation_changes_one_setting_and_names_the_papers_figures(
    name: str, base: str, change: tuple[str, Any, Any], figures: str
) -> None:
    recipe, (setting, before, after) = f"ablation-{name}-224", change
    found = resolve.diff(resolve.load(f"{base}-224"), resolve.load(recipe))
    assert found == [("recipe", f"{base}-224", recipe), (f"model.{setting}", before, after)]
    expected = next(line for line in (resolve.RECIPES[recipe].__doc__ or "").splitlines() if "Expected:" in line)
    assert re.findall(r"\d\d\.\d", expected) == figures.split()


def test_every_ablation_and_layout_is_checked_above() -> None:
    named = {name for name in resolve.names() if name.startswith(("ablation-", "study-"))}
    assert named == {f"ablation-{name}-224" for name, *_ in ABLATIONS} | {n for n in TABLE_10 if n.startswith("study-")}


@pytest.mark.parametrize("name", [n for n in resolve.names() if n.startswith(("ablation-", "study-", "coatnet2-"))])
def test_estimates_of_the_study_follow_from_the_counts(name: str) -> None:
    run, text = resolve.load(name), resolve.RECIPES[name].__doc__ or ""
    share, devices, hours, dollars = map(
        float, re.findall(r"estimate, (\d+) % of peak\): (\d+) H100, ([\d.]+) hours?, (\d+) USD", text)[0]
    )
    images = IMAGES[name.split("-")[-2]] * run.optim.epochs
    flops = 6 * cost.count(spec.of(run.model), 224).multiply_adds * images
    device_hours = flops / (share / 100 * 989e12) / 3600
    assert dollars == pytest.approx(2.5 * device_hours, rel=0.08)
    assert hours == pytest.approx(device_hours / devices, rel=0.1)


@pytest.mark.parametrize("data", ["in1k", "jft300m"])
def test_the_studys_steps_are_those_of_figure_1(data: str) -> None:
    run = resolve.load(f"study-c-c-t-t-{data}-224")
    # Its axes end before 100 thousand and 225 thousand steps.
    assert round(resolve.total_steps(run, int(IMAGES[data])), -3) == {"in1k": 94_000, "jft300m": 220_000}[data]


@pytest.mark.parametrize(
    ("recipe", "words", "stride"),
    [
        ("coatnet5-jft300m-224", ["--model.name", "coatnet3-dagger", "--optim.lr", "1e-3"], "depthwise"),
        ("coatnet7-jft3b-224", ["--model.name", "coatnet6-table12"], "expansion"),
    ],
)
def test_the_named_variants_train_by_an_override(recipe: str, words: list[str], stride: str) -> None:
    run = resolve_command(recipe, words)
    found = spec.of(run.model)
    assert (found.name, found.stride, run.recipe) == (words[1], stride, recipe)
