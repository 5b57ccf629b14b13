"""The recipes hold the paper's values: typed here again from its table 10, not read from the code."""

import pytest

from configs import resolve
from models import spec

# drop path, loss, smoothing, epochs, peak lr, schedule, warm-up steps, warm-up epochs, weight decay, RandAugment, mixup
TABLE_10 = {
    "coatnet0-in1k-224": (0.2, "softmax", 0.1, 300, 0.001, "cosine", 10_000, 0, 0.05, (2, 15), 0.8),
    "coatnet4-in21k-224": (0.7, "sigmoid", 0.0001, 90, 0.001, "linear", 0, 5, 0.01, (2, 5), 0.0),
    "coatnet5-jft300m-224": (0.0, "sigmoid", 0.0001, 14, 0.0005, "linear", 20_000, 0, 0.01, (2, 5), 0.0),
}
TABLE_10["coatnet7-jft3b-224"] = TABLE_10["coatnet5-jft300m-224"]
MODELS = {
    "coatnet0-in1k-224": ("coatnet0", 1, "none"),
    "coatnet4-in21k-224": ("coatnet4", 3, "full"),
    "coatnet5-jft300m-224": ("coatnet5", 3, "full"),
    "coatnet7-jft3b-224": ("coatnet7", 3, "full"),
}


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
    assert spec.get(run.model.name).stride == "expansion"


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
