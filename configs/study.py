"""The paper's study of layouts and its ablations as recipes (arXiv 2106.04803, figure 1, tables 2 and 6 to 8).

The layouts train without the augmentation and regularisation of the paper's section 4.1: RandAugment, mixup, stochastic
depth, label smoothing, weight decay. Crops and mirroring stay. What the paper does not print of the study (batch,
learning rate and its schedule) is table 10's; batches of 4096 agree with the steps on figure 1's axes. The layouts'
sizes are our choice (models/spec.py), so that the order of the layouts is to be expected and not the paper's figures.

Costs are estimates: model FLOPs 6 x multiply-adds x images, at the stated share of an H100's 989 TFLOP/s in bf16 and
2.50 USD per GPU-hour.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from configs import imagenet, jft
from configs.schema import Run

Recipe = Callable[[], Run]

LAYOUTS = ("C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "ViT_rel")
GENERALISATION = "C-C-C-C ~ C-C-C-T >= C-C-T-T > C-T-T-T >> ViT_rel"
CAPACITY = "C-C-T-T ~ C-T-T-T > ViT_rel > C-C-C-T > C-C-C-C"


@dataclass(frozen=True)
class Ablation:
    """One row of the paper's ablations.

    Attributes:
        name: of the recipe, between "ablation-" and the data.
        what: the change in words.
        changes: the settings of the model that make it.
        source: where the paper has it.
        expected: what the paper prints.
    """

    name: str
    what: str
    changes: dict[str, Any]
    source: str
    expected: str


BIAS_OFF, LAYER_NORM = {"relative_bias": "none"}, {"conv_norm": "layer"}
MORE_ATTENTION, MORE_CONVOLUTION = {"depths": (2, 2, 2, 18, 2)}, {"depths": (2, 2, 8, 12, 2)}

ON_IN1K = (
    Ablation("no-relative-bias", "without relative bias", BIAS_OFF, "table 6", "83.8 %; with it 84.1 %"),
    Ablation(
        "post-softmax-bias",
        "with the relative bias after the softmax",
        {"relative_bias": "post"},
        "section 2.1, which prefers the bias before the softmax",
        "no figure is printed; before the softmax 84.1 %",
    ),
    Ablation("head-size-64", "with heads of 64 channels", {"head_size": 64}, "table 8", "83.9 %; with 32 84.1 %"),
    Ablation("layer-norm", "with LayerNorm in MBConv", LAYER_NORM, "table 8", "84.1 %; with BatchNorm 84.1 %"),
    Ablation(
        "depths-2-2-2-18-2", "with 4 blocks of S2 in S3 instead", MORE_ATTENTION, "table 7, V1", "83.4 %; of V0 84.1 %"
    ),
    Ablation(
        "depths-2-2-8-12-2",
        "with 2 blocks of S3 in S2 instead",
        MORE_CONVOLUTION,
        "table 7, V2",
        "84.0 %; of V0 84.1 %",
    ),
)
ON_IN21K = (
    Ablation(
        "no-relative-bias",
        "without relative bias",
        BIAS_OFF,
        "table 6, which names no model; its 53.0 % and 87.9 % are CoAtNet-3's in tables 7 and 8",
        "87.4 % (precision@1 before that 52.8 %); with it 87.9 % (53.0 %)",
    ),
    Ablation("layer-norm", "with LayerNorm in MBConv", LAYER_NORM, "table 8", "87.8 %; with BatchNorm 87.9 %"),
    Ablation(
        "depths-2-2-2-18-2",
        "with 4 blocks of S2 in S3 instead",
        MORE_ATTENTION,
        "table 7, V1",
        "87.4 % (precision@1 before that 53.0 %); of V0 87.6 % (53.0 %)",
    ),
)


def coatnet2_in1k_224() -> Run:
    """CoAtNet-2 from scratch on ImageNet-1k at 224 px, 300 epochs: what the ablations are compared with.

    Source: table 10, column ImageNet-1k pre-training, third of each entry.
    Expected: 84.1 % top-1 at 224 (table 4).
    Hardware, time, cost (estimate, 20 % of peak): 8 H100, 6.5 hours, 130 USD.
    Command: `coatnet train coatnet2-in1k-224 --data.path SHARDS`
    """
    base = imagenet.coatnet0_in1k_224()
    return replace(
        base,
        recipe="coatnet2-in1k-224",
        model=replace(base.model, name="coatnet2", drop_path=0.5),
        parallel=replace(base.parallel, recompute="selective"),
    )


def coatnet3_in21k_224() -> Run:
    """CoAtNet-3 pre-trained on ImageNet-21k at 224 px, 90 epochs: what the ablations are compared with.

    Source: table 10, column ImageNet-21k pre-training, second of each entry.
    Expected: precision@1 53.0 % (table 7); ImageNet-1k top-1 after fine-tuning at 384 87.6 % (tables 4 and 7).
    Hardware, time, cost (estimate, 30 % of peak): 32 H100, 7 hours, 560 USD.
    Command: `coatnet train coatnet3-in21k-224 --data.path SHARDS`
    """
    base = imagenet.coatnet4_in21k_224()
    return replace(
        base,
        recipe="coatnet3-in21k-224",
        model=replace(base.model, name="coatnet3", drop_path=0.5),
        augment=replace(base.augment, randaugment_layers=0, randaugment_magnitude=0.0),
    )


def _plain(base: Run, name: str, layout: str) -> Run:
    """The base with another network, and without augmentation and regularisation."""
    return replace(
        base,
        recipe=name,
        model=replace(base.model, name=layout, drop_path=0.0),
        augment=replace(base.augment, randaugment_layers=0, randaugment_magnitude=0.0, mixup_alpha=0.0),
        optim=replace(base.optim, label_smoothing=0.0, weight_decay=0.0),
        parallel=replace(base.parallel, zero=1, recompute="selective"),
    )


def _on_in1k(layout: str) -> tuple[str, Recipe]:
    """Name and recipe of a layout's generalisation."""
    name = f"study-{_written(layout)}-in1k-224"

    def recipe() -> Run:
        return _plain(imagenet.coatnet0_in1k_224(), name, layout)

    recipe.__doc__ = f"""{layout} from scratch on ImageNet-1k at 224 px, 300 epochs, nothing regularised.

    Source: section 2.2 and figure 1a; batch, learning rate and schedule from table 10, column ImageNet-1k pre-training.
    Expected: top-1 at equal training loss (no figure is printed): {GENERALISATION}.
    Hardware, time, cost (estimate, 20 % of peak): 8 H100, 2 hours, 41 USD.
    Command: `coatnet train {name} --data.path SHARDS`
    """
    return name, recipe


def _on_jft(layout: str) -> tuple[str, Recipe]:
    """Name and recipe of a layout's capacity."""
    name = f"study-{_written(layout)}-jft300m-224"
    printed = {
        "C-C-T-T": " Table 2: precision@1 34.40 %; fine-tuned on ImageNet-1k 82.39 % at 224, 84.23 % at 384.",
        "C-T-T-T": " Table 2: precision@1 34.36 %; fine-tuned on ImageNet-1k 81.78 % at 224, 84.02 % at 384.",
    }

    def recipe() -> Run:
        run = _plain(jft.coatnet5_jft300m_224(), name, layout)
        return replace(run, optim=replace(run.optim, epochs=3.0, lr=1e-3))  # table 10's for its smallest model on JFT

    recipe.__doc__ = f"""{layout} on JFT-300M at 224 px, 3 epochs, nothing regularised.

    Source: section 2.2 and figure 1b; batch, learning rate and schedule from table 10, column JFT-300M pre-training,
    first of each entry.
    Expected: training loss and precision@1: {CAPACITY}.{printed.get(layout, "")}
    Hardware, time, cost (estimate, 20 % of peak): 8 H100, 5 hours, 97 USD.
    Command: `coatnet train {name} --data.path SHARDS`
    """
    return name, recipe


def _ablation(row: Ablation, unchanged: Recipe) -> tuple[str, Recipe]:
    """Name and recipe of one change to the network of another recipe."""
    base = unchanged()
    on_in1k = base.recipe.endswith("in1k-224")
    name = f"ablation-{row.name}-{'in1k' if on_in1k else 'in21k'}-224"
    model, data = ("CoAtNet-2", "ImageNet-1k") if on_in1k else ("CoAtNet-3", "ImageNet-21k")
    measured = "top-1 at 224" if on_in1k else "top-1 on ImageNet-1k after fine-tuning at 384"
    cost = "20 % of peak): 8 H100, 6.5 hours, 130" if on_in1k else "30 % of peak): 32 H100, 7 hours, 560"

    def recipe() -> Run:
        run = unchanged()
        return replace(run, recipe=name, model=replace(run.model, **row.changes))

    recipe.__doc__ = f"""{model} {row.what} on {data} at 224 px.

    Source: {row.source}; all else as in `{base.recipe}`.
    Expected: {measured}: {row.expected}.
    Hardware, time, cost (estimate, {cost} USD.
    Command: `coatnet train {name} --data.path SHARDS`
    """
    return name, recipe


def _written(layout: str) -> str:
    """A layout's name as part of a recipe's."""
    return layout.lower().replace("_", "-")


RECIPES: dict[str, Recipe] = dict(
    [
        *map(_on_in1k, LAYOUTS),
        *map(_on_jft, LAYOUTS),
        ("coatnet2-in1k-224", coatnet2_in1k_224),
        *(_ablation(row, coatnet2_in1k_224) for row in ON_IN1K),
        ("coatnet3-in21k-224", coatnet3_in21k_224),
        *(_ablation(row, coatnet3_in21k_224) for row in ON_IN21K),
    ]
)
