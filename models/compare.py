"""Whether weights fit a network: the design first, then the classes. Resolutions may differ."""

from dataclasses import fields, replace

from configs.errors import InputError
from models.card import Card
from models.design import Spec, Stage
from models.interop import CLASSIFIER, KeepOrReset, shapes
from models.resize import is_table


def check_fit(card: Card, spec: Spec, labels: tuple[str, ...], where: str, head: KeepOrReset, remedy: str) -> None:
    """Refuse weights that another network or other classes were trained with. Resolutions may differ.

    Args:
        labels: the classes of the network to fill, in the classifier's order.
        remedy: the option that replaces the classifier, for the message.

    Raises:
        InputError: every difference in design, the first tensor that does not fit, and what to do.
    """
    found = differences(card.spec, spec)
    if found:
        theirs = shapes(card)
        ours = shapes(replace(card, spec=spec, resolution=spec.size(spec.total_stride)))
        unlike = [name for name in sorted(ours.keys() | theirs.keys()) if not is_table(name)]
        first = next((name for name in unlike if ours.get(name) != theirs.get(name)), "")
        tensor = (
            f"; first tensor that differs: {first} {theirs.get(first)} there, {ours.get(first)} here" if first else ""
        )
        raise InputError(
            f"{where}: holds {card.spec.name}, which is not the {spec.name} to fill: {'; '.join(found)}{tensor}. Take "
            f"the same --model settings, or other weights"
        )
    if head == "reset":
        return
    weight = CLASSIFIER + "weight"
    if card.classes != len(labels):
        raise InputError(
            f"{where}: {weight} has {card.classes} classes, {len(labels)} are wanted; {remedy} replaces the classifier"
        )
    if card.labels and card.labels != labels:
        number = next(index for index, pair in enumerate(zip(card.labels, labels, strict=True)) if pair[0] != pair[1])
        raise InputError(
            f"{where}: {weight} knows other classes: number {number} is {card.labels[number]!r} there and "
            f"{labels[number]!r} here; {remedy} replaces the classifier"
        )


def differences(theirs: Spec, ours: Spec) -> list[str]:
    """What makes two specs different functions, a phrase each. Names and initial weights do not."""
    found = []
    for item in fields(Spec):
        there, here = getattr(theirs, item.name), getattr(ours, item.name)
        if item.name in ("name", "published", "kernel_std") or there == here:
            continue
        if item.name != "stages":
            found.append(f"{item.name} is {there} there, {here} here")
        elif [stage.name for stage in there] != [stage.name for stage in here]:
            names = [", ".join(f"{stage.name} {stage.block}" for stage in stages) for stages in (there, here)]
            found.append(f"stages are {names[0]} there, {names[1]} here")
        else:
            found += [
                f"{a.name} is {_stage(a)} there, {_stage(b)} here" for a, b in zip(there, here, strict=True) if a != b
            ]
    return found


def _stage(stage: Stage) -> str:
    """A stage in a few words."""
    return f"{stage.depth} {stage.block} of width {stage.width}, stride {stage.stride}"
