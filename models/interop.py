"""Weights in and out: one safetensors file with our tensors' names and a model card. No pickle, no network needed.

Offline, in a few lines:

    from models import interop
    weights = interop.read("digits.safetensors")                 # weights.card says what they are; weights.tensors
    model = interop.load_model("digits.safetensors")             # in evaluation mode on the CPU
    larger = interop.load_model("digits.safetensors", 96)        # the same at 96 px: relative-bias tables resized

A file may be wrong in any way; what does not fit is refused by the tensor's name before it is used.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from configs.errors import InputError
from models import card as cards
from models import coatnet, timm_names
from models.blocks import Head
from models.card import Card
from models.coatnet import CoAtNet
from models.design import Resolution
from models.resize import is_table, resize_table
from models.weight_file import check_finite, located, read_safetensors, save

HEADER = "coatnet"  # the key of the card in the file's metadata, the only one: two keys have no fixed order
CLASSIFIER = "blocks.head.0.classifier."
KeepOrReset = Literal["keep", "reset"]  # what happens to the classifier

_CLASSIFIERS = (CLASSIFIER + "weight", CLASSIFIER + "bias")


@dataclass(frozen=True)
class Weights:
    """A network's parameters and BatchNorm statistics under our names, float32 on the CPU, and their card."""

    card: Card
    tensors: Mapping[str, Tensor]


def shapes(card: Card) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a network of this card has.

    Raises:
        InputError: the card describes no network.
    """
    return {name: tuple(tensor.shape) for name, tensor in network(card).state_dict().items()}


def network(card: Card) -> CoAtNet:
    """The network of a card on the meta device, without its weights.

    Raises:
        InputError: the card describes no network.
    """
    try:
        return coatnet.build(card.spec, resolution=card.resolution, classes=card.classes)
    except (ValueError, RuntimeError, ArithmeticError) as error:  # what torch raises for impossible sizes
        raise InputError(f"the model card describes no network: {error}") from None


def write(path: Path, weights: Weights, names: Literal["coatnet", "timm"] = "coatnet", force: bool = False) -> None:
    """Write weights and card as one file, aside and then renamed. Equal weights give equal bytes.

    Args:
        names: whose tensor names; timm's state loads strictly into timm's model of `timm_names.arguments`.
        force: replace a file that is there.

    Raises:
        InputError: the file is there or cannot be written, a weight is not finite, or timm has no such network.
    """
    check_finite(weights.tensors, str(path))
    tensors = dict(weights.tensors)
    if names == "timm":
        timm_names.arguments(weights.card.spec, weights.card.resolution)
        tensors = timm_names.to_timm(tensors, weights.card.spec)
    save(path, tensors, {HEADER: cards.to_json(replace(weights.card, names=names))}, force)


def read(path: Path | str) -> Weights:
    """The weights in a file that `write` made, or in a folder that holds it, checked against their own card.

    Every tensor is there, of the right shape and type, and none is left over; values are looked at in `check_finite`.

    Raises:
        InputError: naming the file and the tensor: damaged, a pickle, without a card, or not what its card says.
    """
    file = located(Path(path))
    header, tensors = read_safetensors(file)
    if HEADER not in header:
        raise InputError(
            f"{file}: has no model card, so `coatnet export` did not write it; `coatnet import` takes timm's weights "
            f"from their folder with config.json"
        )
    try:
        card = cards.from_json(header[HEADER])
        if sum(stage.depth for stage in card.spec.stages) > len(tensors):
            raise InputError(f"the model card describes more blocks than the file's {len(tensors)} tensors")
        wanted = shapes(card)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if card.names == "timm":
        if timm_names.obstacles(card.spec):
            raise InputError(f"{file}: claims timm's names for {card.spec.name}, which timm cannot express")
        tensors = timm_names.from_timm(tensors, card.spec, wanted, str(file))
    else:
        _check_shapes(tensors, wanted, card, str(file))
    return Weights(replace(card, names="coatnet"), tensors)


def load_model(path: Path | str, resolution: Resolution | None = None) -> CoAtNet:
    """The network in a file, with its weights, in evaluation mode on the CPU.

    Args:
        path: see `read`.
        resolution: pixels; None: those of the card. Otherwise the relative-bias tables are resized.

    Raises:
        InputError: see `read`; a weight that is not finite; a resolution that the total stride does not divide.
    """
    weights = read(path)
    model = network(replace(weights.card, resolution=weights.card.spec.size(resolution or weights.card.resolution)))
    coatnet.initialise(model, 0, "cpu")
    fill(model, weights.tensors.items(), str(path))
    return model.eval()


def reset_classifier(weights: Weights, classes: int) -> Weights:
    """The same weights with a fresh classifier for other classes; the head's norm and hidden layer stay.

    Args:
        classes: of which the labels are not known.
    """
    spec = weights.card.spec
    with torch.device("meta"):
        head = Head(spec.stages[-1].width, classes)
    prefix = CLASSIFIER.removesuffix("classifier.")
    coatnet.initialise_block(prefix[:-1], head.to_empty(device="cpu"), 0, spec.kernel_std)
    fresh = {prefix + name: tensor for name, tensor in head.state_dict().items() if prefix + name in _CLASSIFIERS}
    return Weights(replace(weights.card, classes=classes, labels=(), metrics={}), {**weights.tensors, **fresh})


@torch.no_grad()
def fill(model: CoAtNet, tensors: Iterable[tuple[str, Tensor]], where: str, head: KeepOrReset = "keep") -> None:
    """Give a network its weights, or a part that was cut from one; see `fitted`, whose errors it raises.

    Args:
        model: on any device but meta.
        tensors: all of a network's, by name.
        where: their file, for messages.
        head: "reset" leaves the classifier as it is.
    """
    targets = model.state_dict()
    for name, value in fitted(model, tensors, where, head):
        targets[name].copy_(value)


def fitted(
    model: CoAtNet, tensors: Iterable[tuple[str, Tensor]], where: str, head: KeepOrReset = "keep"
) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they go into a network, or into a part that was cut from one: tables resized to its resolution.

    Args:
        model: on any device, meta too: only its shapes count.
        tensors: all of a network's, by name.
        where: their file, for messages.
        head: "reset" leaves out the classifier's.

    Raises:
        InputError: a tensor that is missing, unknown, of another shape or not finite, by name, and what to do.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    elsewhere = {block.name for block in model.spec.blocks(model.resolution)} - {name for name, _ in model.flat}
    for name, value in tensors:
        shape = shapes.pop(name, None)
        if shape is None and name.rsplit(".", name.count(".") - 2)[0] in elsewhere:
            continue
        if shape is None:
            raise InputError(f"{where}: tensor {name} is unknown to {model.spec.name}; it belongs to another network")
        if head == "reset" and name.startswith(CLASSIFIER):
            continue
        check_finite({name: value}, where)
        if is_table(name) and value.dim() == 3 and value.shape[0] == shape[0]:
            value = resize_table(value, *shape[1:])
        if tuple(value.shape) != shape:
            raise InputError(_misshapen(where, name, tuple(value.shape), shape))
        yield name, value
    if shapes:
        raise InputError(f"{where}: has no tensor {min(shapes)}; it does not hold a whole {model.spec.name}")


def _check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], card: Card, where: str) -> None:
    """Hold the tensors of a file with our names against its card."""
    missing, left = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing:
        raise InputError(f"{where}: has no tensor {missing[0]}; it does not hold a whole {card.spec.name}")
    if left:
        raise InputError(f"{where}: tensor {left[0]} belongs to no {card.spec.name} as the model card describes it")
    for name, shape in wanted.items():
        if tensors[name].dtype != torch.float32:
            raise InputError(f"{where}: {name} holds {tensors[name].dtype}, must be torch.float32")
        if tuple(tensors[name].shape) != shape:
            raise InputError(_misshapen(where, name, tuple(tensors[name].shape), shape))


def _misshapen(where: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The message about a tensor of a wrong shape."""
    if is_table(name):
        why = "it fits no grid of this resolution: heads x (2 rows - 1) x (2 columns - 1)"
    elif name.startswith(CLASSIFIER):
        why = "the number of classes differs; --head reset (in training --init.head reset) replaces the classifier"
    else:
        why = "it belongs to another network"
    return f"{where}: {name} has shape {found}, must be {wanted}; {why}"
