"""The model card in the header of an exported file: everything to rebuild and use the network it holds. No torch."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.errors import InputError, unknown
from configs.run_json import convert
from models.design import Spec

FORMAT = 1
LARGEST = 1 << 20  # no side of a picture, width, depth or class count is larger
OMITTED = ("published",)  # of a spec: what the paper prints does not make the network


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input.

    Attributes:
        mean, std: subtracted from and divided into RGB values between 0 and 1.
        crop: "center" is the central square, of which `eval_crop` of a side is kept; "squash" the whole picture.
        interpolation: of the resize to the resolution, with antialias.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: Literal["center", "squash"] = "center"
    eval_crop: float = 0.875
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Card:
    """What is known about a set of weights.

    Attributes:
        spec: the network as data, so that it can be built whether or not a program knows its name.
        resolution: (height, width) in pixels, to which the relative-bias tables belong.
        labels: the classes' names in the classifier's order; empty where they are not known.
        weights: the trained weights themselves, or their moving average.
        step: optimizer updates behind them.
        recipe, config: the run's recipe and the digest of its configuration; a timm model's name and "".
        metrics: scores on the held-out split by name, of these weights at this step; empty where none were taken.
        versions: of the packages that trained them.
        license: as the exporter states it; empty: not stated.
        names: whose tensor names the file uses; in memory they are always ours.
        loss: what made the logits: with sigmoid every class is a decision of its own.
    """

    spec: Spec
    resolution: tuple[int, int]
    classes: int
    labels: tuple[str, ...] = ()
    weights: Literal["raw", "ema"] = "raw"
    step: int = 0
    recipe: str = ""
    config: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    preprocessing: Preprocessing = Preprocessing()
    versions: dict[str, str] = field(default_factory=dict)
    license: str = ""
    names: Literal["coatnet", "timm"] = "coatnet"
    loss: Literal["softmax", "sigmoid"] = "softmax"
    format: int = FORMAT


def to_json(card: Card) -> str:
    """The card as one line of ASCII JSON; equal cards give equal text."""
    document = dataclasses.asdict(card)
    for name in OMITTED:
        del document["spec"][name]
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> Card:
    """The card that `to_json` wrote. What is absent has its default, so that older files stay readable.

    Raises:
        InputError: not JSON, another format, an unknown or missing field, or a value no network can have.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the model card is not JSON: {error}") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise InputError(f"the model card has format {found!r}, this program reads {FORMAT}; take a newer release")
    card: Card = _value("card", document, Card)
    check(card)
    return card


def check(card: Card) -> None:
    """Refuse sizes that make no network, before one is built from them.

    Raises:
        InputError: naming the field.
    """
    spec = card.spec
    height, width = card.resolution
    sizes: dict[str, float] = {"classes": card.classes, "height": height, "width": width, "spec.kernel": spec.kernel}
    sizes |= {"spec.head_size": spec.head_size, "spec.expansion": spec.expansion, "spec.stages": len(spec.stages)}
    for stage in spec.stages:
        sizes |= {f"{stage.name}.{name}": getattr(stage, name) for name in ("depth", "width", "stride")}
    wrong = [f"{name} = {value}" for name, value in sizes.items() if not 1 <= value <= LARGEST]
    if wrong or not 0 < spec.se_ratio <= 1:
        raise InputError(f"the model card has {wrong[0] if wrong else f'spec.se_ratio = {spec.se_ratio}'}: no network")
    if len({stage.name for stage in spec.stages}) < len(spec.stages):
        raise InputError("the model card names two stages alike: no network")
    if card.labels and len(card.labels) != card.classes:
        raise InputError(f"the model card has {len(card.labels)} labels for {card.classes} classes")


def preprocessing(document: object) -> Preprocessing:
    """The preprocessing in a JSON object.

    Raises:
        InputError: a value of the wrong type.
    """
    found: Preprocessing = _value("preprocessing", document, Preprocessing)
    return found


def _value(name: str, value: object, kind: Any) -> Any:
    """A JSON value as the type `kind`: a dataclass, a dict, a tuple of any length, or what `convert` knows."""
    if dataclasses.is_dataclass(kind):
        return _build(name, value, typing.cast(type, kind))
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{name} = {value!r}: must be a JSON object")
        return {key: _value(f"{name}.{key}", item, inner[1]) for key, item in value.items()}
    if typing.get_origin(kind) is tuple and inner[-1] is Ellipsis:
        if not isinstance(value, list):
            raise InputError(f"{name} = {value!r}: must be a JSON array")
        return tuple(_value(f"{name}[{index}]", item, inner[0]) for index, item in enumerate(value))
    return convert(name, value, kind)


def _build(name: str, document: object, kind: type) -> Any:
    """A dataclass instance from its JSON object, which may leave out fields with a default but has no others."""
    if not isinstance(document, dict):
        raise InputError(f"{name} = {document!r}: must be a JSON object")
    kinds = {key: inner for key, inner in typing.get_type_hints(kind).items() if key not in OMITTED}
    for key in document:
        if key not in kinds:
            raise unknown("field", f"{name}.{key}", [f"{name}.{known}" for known in kinds])
    missing = [
        item.name
        for item in dataclasses.fields(kind)
        if item.name not in document and item.default is item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{name}.{missing[0]}: missing in the model card")
    return kind(**{key: _value(f"{name}.{key}", value, kinds[key]) for key, value in document.items()})
