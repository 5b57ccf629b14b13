"""A run's weights with their card, from a checkpoint that verifies; no ranks, no process group, no data."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from configs import resolve
from configs.errors import InputError
from configs.schema import Run
from models import hub_folder, interop, spec, timm_design, timm_names
from models.card import Card, Preprocessing
from models.interop import Weights
from trainer.state import checkpoint, retention
from trainer.state.checkpoint import Saved
from trainer.tracking import mlflow_model

Choice = Literal["auto", "raw", "ema"]
Format = Literal["safetensors", "timm", "huggingface", "mlflow"]


def is_run(path: Path) -> bool:
    """Whether a path is a run folder."""
    return (path / "run.json").is_file()


def export(
    source: Path,
    form: Format = "safetensors",
    out: Path | None = None,
    *,
    choice: Choice = "auto",
    step: int = 0,
    terms: str = "",
    force: bool = False,
) -> tuple[Path, Card]:
    """Write the weights of a run folder, or of an exported file, in the given form.

    Args:
        out: None: the folder `export` of the run; beside the file.
        choice: "auto" is a run's averaged weights where it keeps them.
        step: of the checkpoint; 0 is the newest that verifies.
        terms: the license to state; empty: what the source states.
        force: replace what is there.

    Returns:
        What was written, and its card.

    Raises:
        InputError: nothing to export, nothing that the form can express, or a place that cannot be written.
    """
    weights = of_run(source, step, choice) if is_run(source) else _of_file(source, step, choice)
    if terms:
        weights = replace(weights, card=replace(weights.card, license=terms))
    if form == "timm":
        timm_names.arguments(weights.card.spec, weights.card.resolution)  # refuses before anything is written
    home = source / "export" if is_run(source) else source.parent
    name = source.resolve().name if source.is_dir() else source.stem
    endings = {"safetensors": ".safetensors", "timm": "-timm.safetensors", "huggingface": "-huggingface",
               "mlflow": "-mlflow"}  # fmt: skip
    path = out or home / f"{name}-{weights.card.weights}{endings[form]}"
    if form == "huggingface":
        hub_folder.write(path, weights, force)
    elif form == "mlflow":
        mlflow_model.write(path, weights, force)
    else:
        interop.write(path, weights, "timm" if form == "timm" else "coatnet", force)
    return path, weights.card


def of_run(folder: Path, step: int = 0, choice: Choice = "auto") -> Weights:
    """The weights of a run's checkpoint.

    Raises:
        InputError: see `saved_in` and `card_of`.
    """
    saved = saved_in(folder, step)
    card = card_of(folder, saved, choice)
    model = interop.network(card)
    return Weights(card, dict(checkpoint.tensors(saved, model, average=card.weights == "ema")))


def saved_in(folder: Path, step: int = 0, verified: bool = True, say: Callable[[str], object] | None = None) -> Saved:
    """A run's checkpoint: the one of `step`, or with 0 the newest that verifies.

    Args:
        verified: false takes a complete one without reading all its bytes.
        say: takes what is passed over and why; None: stderr.

    Raises:
        InputError: there is none, with those that there are, or what is wrong with the one that is asked for.
    """
    root = folder / "checkpoints"
    found = retention.found(root)
    wanted = [path for path in found if not step or path == retention.step_folder(root, step)]
    for path in wanted:
        held = retention.hold(path)
        bad = checkpoint.damage(path) if verified else "" if (path / "COMPLETE").exists() else "it is not complete"
        if not bad:
            return checkpoint.opened(path, held)
        (say or _to_stderr)(f"passed over {path}: {bad}")
    steps = ", ".join(str(int(path.name[5:])) for path in reversed(found)) or "none"
    what = f"no checkpoint of step {step} that verifies" if step else "no checkpoint that verifies"
    raise InputError(f"{root}: {what}; steps there: {steps}; `coatnet train` writes them")


def card_of(folder: Path, saved: Saved, choice: Choice = "auto", run: Run | None = None) -> Card:
    """The card of a run's checkpoint.

    Args:
        run: None: what the folder says it is.

    Raises:
        InputError: averaged weights are asked for and the run keeps none.
    """
    run = run or resolve.recorded(folder / "run.json")
    if choice == "ema" and not run.optim.ema:
        raise InputError(f"{folder}: keeps no averaged weights (optim.ema = 0); take the raw ones")
    average = choice == "ema" or (choice == "auto" and run.optim.ema > 0)
    labels = tuple(saved.state["vocabulary"])
    return Card(
        spec.of(run.model),
        (run.model.resolution, run.model.resolution),
        len(labels),
        labels,
        "ema" if average else "raw",
        saved.step,
        run.recipe,
        str(saved.state["config"]),
        _scores(folder, saved.step, "eval_ema/" if average else "eval/"),
        _preprocessing(run),
        dict(saved.state["versions"]),
        loss=run.optim.loss,
    )


def _of_file(source: Path, step: int, choice: Choice) -> Weights:
    """The weights in an exported file, which are of one step and kind."""
    if not source.exists():
        raise InputError(f"{source}: no run folder and no file; `coatnet train` makes run folders under runs/")
    weights = timm_design.read_any(source)
    card = weights.card
    for option, given, has in (("--step", step or card.step, card.step), ("--weights", choice, card.weights)):
        if given not in ("auto", has):
            raise InputError(f"{option} {given}: {source} holds {has} only; export it from the run folder")
    return weights


def _scores(folder: Path, step: int, prefix: str) -> dict[str, float]:
    """The scores in evaluation.json if they are of this step and these weights."""
    file = folder / "evaluation.json"
    if not file.exists():
        return {}
    try:
        scores = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}; `coatnet eval {folder}` writes it again") from None
    if scores.get("step") != step:
        return {}
    named = {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}
    return {name: float(value) for name, value in named.items() if math.isfinite(value)}


def _preprocessing(run: Run) -> Preprocessing:
    """What evaluation does to a picture (`data_pipeline.augment.eval_view`)."""
    whole = run.augment.crop == "resize"
    share = 1.0 if whole else run.augment.eval_crop
    return Preprocessing(run.augment.mean, run.augment.std, "squash" if whole else "center", share)


def _to_stderr(text: str) -> None:
    """Tell the user beside the command's output."""
    sys.stderr.write(text + "\n")
