"""Weights of another run, or of an exported file, in place of fresh ones: `coatnet train --init.path`.

They go into the engine's fragments, which are intervals of parameters, and so into every layout; a checkpoint's
fragments are intervals too, so that they come from every layout.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import InputError
from configs.schema import Init, Run
from data_pipeline.manifest import Dataset
from models import interop, spec, timm_design
from models.card import Card
from models.compare import check_fit
from models.weight_file import check_finite, located
from trainer.engine import network
from trainer.engine.ema import AVERAGE
from trainer.engine.engine import Engine
from trainer.state import checkpoint, export
from trainer.tracking.track import run_folder

REMEDY = "--init.head reset"


def check(run: Run, dataset: Dataset, verified: bool = True) -> None:
    """Refuse weights that do not fit, before anything starts. A run with a checkpoint of its own needs none.

    Args:
        verified: read every byte and weight of another run's checkpoint as well.

    Raises:
        InputError: the path, what does not fit, and what would.
    """
    _refuse_without_effect(run)
    if not run.init.path or any(run_folder(run).glob("checkpoints/step-*/COMPLETE")):
        return
    path = Path(run.init.path)
    if export.is_run(path):
        saved = export.saved_in(path, verified=verified)
        card = export.card_of(path, saved, run.init.weights)
    else:
        saved, card = None, _of_file(run, path).card
    _check(run, dataset, card)
    if saved is not None and verified:
        for name, value in checkpoint.tensors(saved, interop.network(card), average=card.weights == "ema"):
            check_finite({name: value}, run.init.path)


def warm_start(run: Run, dataset: Dataset, engine: Engine) -> dict[str, Any]:
    """Let an engine begin with the weights that the run starts from. A collective call.

    Returns:
        What the run's events say about it: path, digest, kind and step of the weights, and their resolution.

    Raises:
        InputError: they do not fit or are not finite, by the tensor's name.
    """
    path, member = Path(run.init.path), engine.member
    if export.is_run(path):
        saved = checkpoint.newest(path / "checkpoints", member)
        if saved is None:
            raise InputError(f"init.path = {run.init.path!r}: has no checkpoint that verifies")
        card = export.card_of(path, saved, run.init.weights)
        tensors = checkpoint.tensors(saved, interop.network(card), average=card.weights == "ema")
        digest = (saved.path / "COMPLETE").read_text()
    else:
        weights = _of_file(run, path)
        card, tensors = weights.card, iter(weights.tensors.items())
        with located(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if member.first else ""
    _check(run, dataset, card)
    whole = network.built(run, dataset.classes)
    _fill(engine, interop.fitted(whole, tensors, run.init.path, run.init.head))
    facts = {"path": run.init.path, "digest": digest, "weights": card.weights, "of_step": card.step}
    return facts | {"resolution": list(card.resolution), "head": run.init.head}


@torch.no_grad()
def _fill(engine: Engine, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put whole tensors into what this rank holds of them, and into its averages."""
    parts, buffers = defaultdict(list), engine.buffers()
    for part in engine.fragments(owned=False):
        parts[part.name].append(part)
    for name, value in tensors:
        for part in parts[name]:
            mine = value.reshape(-1)[part.offset : part.offset + part.value.numel()]
            for target in (part.value, part.moments.get("ema")):
                if target is not None:
                    target.copy_(mine)
        for key in {name, AVERAGE + name} & buffers.keys():
            buffers[key].copy_(value)
    engine.restored(0)


def _refuse_without_effect(run: Run) -> None:
    """Refuse settings of weights where none are asked for.

    Raises:
        InputError: naming the field.
    """
    for name, default in (("weights", Init.weights), ("head", Init.head)):
        value = getattr(run.init, name)
        if not run.init.path and value != default:
            raise InputError(f"init.{name} = {value!r}: init.path names no weights; nearest valid: {default!r}")


def _of_file(run: Run, path: Path) -> interop.Weights:
    """The weights in a file or in a folder that is no run's, of the kind that the run asks for."""
    if not path.exists():
        raise InputError(f"init.path = {run.init.path!r}: no run folder and no file; `coatnet export RUN` writes one")
    weights = timm_design.read_any(path)
    if run.init.weights not in ("auto", weights.card.weights):
        raise InputError(
            f"init.weights = {run.init.weights!r}: {path} holds {weights.card.weights} weights only; nearest valid: "
            f"{weights.card.weights!r}"
        )
    return weights


def _check(run: Run, dataset: Dataset, card: Card) -> None:
    """Hold the card against the network and the classes of the run; made-up classes have no names to compare."""
    where, labels = f"init.path = {run.init.path!r}", dataset.vocabulary
    if run.data.synthetic and len(card.labels) == len(labels):
        labels = card.labels
    check_fit(card, spec.of(run.model), labels, where, run.init.head, REMEDY)
