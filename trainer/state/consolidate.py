"""Whole tensors out of a checkpoint's pieces into one safetensors file, one tensor in memory at a time."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs import run_json
from configs.errors import InputError
from configs.schema import Run
from models import card as cards
from models import interop, spec
from models.card import Card
from models.weight_file import check_finite, check_out
from trainer.engine.ema import AVERAGE, running_statistics
from trainer.state import checkpoint, export
from trainer.state.checkpoint import Saved
from trainer.state.durable import sync, write_stream
from trainer.state.sources import CheckpointError, Sources, buffers

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # type and shape by name


@dataclass(frozen=True)
class Whole:
    """Tensors to be read once, one after the other.

    Attributes:
        entries: type and shape by name.
        tensors: their values in that order.
    """

    entries: Entries
    tensors: Iterator[Tensor]


def weights(saved: Saved, choice: export.Choice) -> tuple[Whole, Card]:
    """The weights in a checkpoint of ours, under the network's names, and their card.

    Raises:
        InputError: the average is asked for and there is none.
    """
    card = export.card_of(saved.path.parent.parent, saved, choice, _run(saved))
    model, average = interop.network(card), card.weights == "ema"
    named = dict(model.named_parameters()) | running_statistics(model)
    entries = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in named.items()}
    return Whole(entries, (value for _, value in checkpoint.tensors(saved, model, average))), card


def everything(saved: Saved) -> Whole:
    """All tensors in a checkpoint of ours: KIND/NAME with the kinds value, exp_avg, exp_avg_sq and ema.

    Raises:
        CheckpointError: it does not hold the network that it says it holds.
    """
    sources, run = Sources(saved.path), _run(saved)
    shapes = interop.shapes(Card(spec.of(run.model), (run.model.resolution,) * 2, len(saved.state["vocabulary"])))
    strange = sources.sizes.keys() - shapes.keys()
    if strange:
        raise CheckpointError(f"{saved.path}: {min(strange)} belongs to no {run.model.name}")
    parameters = [(kind, name) for kind in sources.kinds for name in sources.sizes]
    entries = {f"{kind}/{name}": (torch.float32, shapes[name]) for kind, name in parameters}
    statistics = {
        name if name.startswith(AVERAGE) else f"value/{name}": value for _, name, value in buffers(saved.path)
    }
    entries |= {name: (value.dtype, tuple(value.shape)) for name, value in statistics.items()}

    def read() -> Iterator[Tensor]:
        """The tensors in the order of the entries."""
        for kind, name in parameters:
            flat = torch.empty(sources.sizes[name])
            sources.fill(kind, name, 0, flat)
            yield flat
        yield from statistics.values()

    return Whole(entries, read())


def write(out: Path, whole: Whole, metadata: dict[str, str], force: bool = False) -> int:
    """Write one safetensors file, aside and then renamed; returns its bytes.

    Raises:
        InputError: see `check_out`; or it cannot be written, or a value is not finite.
    """
    check_out(out, force)
    aside = out.with_name(out.name + ".partial")

    def checked() -> Iterator[Tensor]:
        """The tensors, each looked at before it is written."""
        for name, value in zip(whole.entries, whole.tensors, strict=True):
            if value.is_floating_point():
                check_finite({name: value}, str(out))
            yield value

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        size: int = write_stream(aside, whole.entries, checked(), metadata)[0]
        os.replace(aside, out)
        sync(out.parent)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error}; choose another --out") from None
    finally:
        aside.unlink(missing_ok=True)
    return size


def header(card: Card | None) -> dict[str, str]:
    """The metadata of a file with this card."""
    return {interop.HEADER: cards.to_json(card)} if card is not None else {}


def _run(saved: Saved) -> Run:
    """The run that a checkpoint says it is of."""
    return run_json.record(json.dumps(saved.state["run"]), saved.path / "state.json")
