"""A folder as the Hugging Face hub holds models: config.json, model.safetensors, README.md. Written, never uploaded.

Where timm can express the network the weights have timm's names and `timm.create_model("local-dir:FOLDER",
pretrained=True)` loads them; otherwise they have ours, and `models.interop.load_model(FOLDER)` does.
"""

import json
import os
from pathlib import Path
from typing import Any

from configs.errors import InputError
from models import card as cards
from models import interop, timm_names
from models.card import Card
from models.interop import Weights
from models.weight_file import FOLDER_FILE, check_finite

FILES = ("config.json", FOLDER_FILE, "README.md")


def write(folder: Path, weights: Weights, force: bool = False) -> None:
    """Write the folder; the weights last, so that a folder without them is not whole.

    Raises:
        InputError: a file is there and is not to be replaced, the folder cannot be written, or a weight is not finite.
    """
    there = [folder / name for name in FILES if (folder / name).exists()]
    if there and not force:
        raise InputError(f"{there[0]}: is there already; --force replaces it, --out chooses another folder")
    check_finite(weights.tensors, str(folder))  # before weights that are there go
    for_timm = not timm_names.obstacles(weights.card.spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FOLDER_FILE).unlink(missing_ok=True)
        _write_text(folder / "config.json", json.dumps(config(weights.card), indent=2) + "\n")
        _write_text(folder / "README.md", readme(weights.card))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}; choose another --out") from None
    interop.write(folder / FOLDER_FILE, weights, "timm" if for_timm else "coatnet", force)


def config(card: Card) -> dict[str, Any]:
    """The contents of config.json: in timm's form where it can express the network."""
    seen = card.preprocessing
    if timm_names.obstacles(card.spec):
        return {"architecture": card.spec.name, "library_name": "coatnet", "card": json.loads(cards.to_json(card))}
    pretrained = {
        "input_size": [3, *card.resolution],
        "fixed_input_size": True,
        "mean": list(seen.mean),
        "std": list(seen.std),
        "interpolation": seen.interpolation,
        "crop_pct": seen.eval_crop,
        "crop_mode": seen.crop,
        "num_classes": card.classes,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
    }
    if card.license:
        pretrained["license"] = card.license
    document: dict[str, Any] = {
        "architecture": timm_names.architecture(card.spec),
        "num_classes": card.classes,
        "num_features": card.spec.stages[-1].width,
        "global_pool": "avg",
        "model_args": timm_names.arguments(card.spec, card.resolution),
        "pretrained_cfg": pretrained,
    }
    if card.labels:
        document["label_names"] = list(card.labels)
    return document


def readme(card: Card) -> str:
    """The page that the hub shows: what the weights are, their scores, and how to load them."""
    for_timm = not timm_names.obstacles(card.spec)
    height, width = card.resolution
    seen = card.preprocessing
    head = ["---", f"library_name: {'timm' if for_timm else 'coatnet'}", "pipeline_tag: image-classification"]
    head += [f"license: {json.dumps(card.license)}"] if card.license else []
    averaged = "averaged (EMA)" if card.weights == "ema" else "raw"
    facts = {
        "network": f"{card.spec.name} (CoAtNet, arXiv 2106.04803), stride in the {card.spec.stride} convolution",
        "input": f"{height} x {width} pixels, RGB; mean {list(seen.mean)}, std {list(seen.std)} on a 0..1 scale, "
        f"{seen.interpolation}, crop {seen.crop} {seen.eval_crop:g}",
        "classes": f"{card.classes:,}",
        "weights": f"{averaged}, after {card.step:,} updates of {card.recipe or 'an unnamed recipe'}"
        + (f" (configuration {card.config})" if card.config else ""),
        "scores": ", ".join(f"{name} {value:.6g}" for name, value in sorted(card.metrics.items())) or "none taken",
        "license": card.license or "not stated",
    }
    loading = (
        'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
        if for_timm
        else 'from models import interop  # of the package coatnet\nmodel = interop.load_model("FOLDER")'
    )
    rows = [f"| {name} | {text.replace('|', ' ')} |" for name, text in facts.items()]
    lines = [*head, "---", "", f"# {card.spec.name}", "", "| | |", "|---|---|", *rows, "", "Offline, from this folder:"]
    return "\n".join([*lines, "", "```python", loading, "```", ""])


def _write_text(file: Path, text: str) -> None:
    """Write a small file aside, then give it its name."""
    aside = file.with_name(file.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)
