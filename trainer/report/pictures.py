"""Pictures of the held-out split with what the network said of them, and the classes it knows least."""

from typing import Any

from trainer.report.gather import Facts
from trainer.report.parts import Html, card, fold, grid, paragraph, section, table, text

FIRST = 10  # classes in a first look


def examples(facts: Facts) -> Html:
    """The section; nothing before the first evaluation to the end."""
    found = facts.examples
    if found is None:
        return Html("")
    names = facts.data["vocabulary"] if facts.data is not None else []
    cards = [card("Drawn at random", _gallery(found["drawn"], names))]
    if found["wrong"]:
        cards.append(card("Most sure of, and wrong", _gallery(found["wrong"], names)))
    return section(f"Pictures and classes, at step {found['step']:,}", grid(*cards), _worst(found, names))


def _gallery(places: list[dict[str, Any]], names: list[str]) -> Html:
    """Pictures with the first guess and, where it is wrong, the labels."""
    shown = []
    for place in places:
        guess, chance = place["top"][0]
        right = "&#10003; " if place["right"] else "&#10007; "
        kind = "right" if place["right"] else "wrong"
        labels = ", ".join(name_of(number, names) for number in place["labels"]) or "nothing"
        also = "" if place["right"] and len(place["labels"]) < 2 else f"<br>is {text(labels)}"
        alt = f"{place['key']}: {labels}"
        picture = f'<img alt="{text(alt)}" src="data:image/jpeg;base64,{place["picture"]}">' if place["picture"] else ""
        shown.append(
            f'<figure title="{text(_chances(place, names))}">{picture}<figcaption><span class="{kind}">{right}'
            f"{text(name_of(guess, names))}</span> {chance:.0%}{also}</figcaption></figure>"
        )
    missing = "" if any(place["picture"] for place in places) else paragraph(
        "The rank that had the scores did not have the pictures (a pipeline's last stage).", "soft")  # fmt: skip
    return Html(f'<div class="pictures">{"".join(shown)}</div>{missing}')


def _chances(place: dict[str, Any], names: list[str]) -> str:
    """The first guesses in words."""
    guesses = ", ".join(f"{name_of(number, names)} {chance:.1%}" for number, chance in place["top"])
    return f"{place['key']}: {guesses}"


def _worst(found: dict[str, Any], names: list[str]) -> Html:
    """The classes with the lowest scores."""
    rows = [
        (name_of(number, names), f"{count:,}", f"{share:.1%}", Html(f'<span class="meter"><i style="width:{share:.1%}">'
                                                                    f"</i></span>"))
        for number, count, share in found["worst"]
    ]  # fmt: skip
    head = ("class", "held-out images", found["score"], "")
    rest = fold(f"the {len(rows)} worst", table(head, rows, (1, 2))) if len(rows) > FIRST else ""
    title = f"Worst of {found['classes']:,} classes"
    return card(title, table(head, rows[:FIRST], (1, 2)), rest)


def name_of(number: int, names: list[str]) -> str:
    """A class's name, or its number where the names are not known."""
    return names[number] if number < len(names) else f"class {number}"
