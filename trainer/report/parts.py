"""Pieces of the page that its sections share: tables, cards, tiles. All text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape

Row = Sequence[object]


class Html(str):
    """Text that is HTML already."""


def text(value: object) -> str:
    """A value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def table(head: Row, rows: Iterable[Row], numbers: Sequence[int] = (), code: Sequence[int] = ()) -> Html:
    """A table.

    Args:
        head: empty: no head.
        rows: of equal length.
        numbers: columns that are set to the right.
        code: columns that are set in a fixed width.
    """
    kinds = dict.fromkeys(numbers, ' class="n"') | dict.fromkeys(code, ' class="code"')
    top = "".join(f"<th{kinds.get(column, '') if column in numbers else ''}>{text(cell)}</th>" for column, cell in
                  enumerate(head))  # fmt: skip
    body = "".join(
        "<tr>" + "".join(f"<td{kinds.get(column, '')}>{text(cell)}</td>" for column, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return Html(f'<div class="scroll"><table>{f"<thead><tr>{top}</tr></thead>" if head else ""}<tbody>{body}</tbody>'
                f"</table></div>")  # fmt: skip


def pairs(rows: Iterable[tuple[object, object]]) -> Html:
    """A table of names and values."""
    return table((), rows)


def card(title: str, *content: str) -> Html:
    """A box with a title."""
    return Html(f'<section class="card">{f"<h3>{escape(title)}</h3>" if title else ""}{"".join(content)}</section>')


def tile(label: str, value: str, more: str = "", picture: str = "", unit: str = "") -> Html:
    """A figure that is read from afar."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    below = f'<div class="more">{escape(more)}</div>' if more else ""
    return Html(
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}{small}</div>'
        f"{below}{picture}</div>"
    )


def grid(*cards: str) -> Html:
    """Boxes side by side."""
    return Html(f'<div class="grid2">{"".join(cards)}</div>')


def section(title: str, *content: str) -> Html:
    """A chapter of the page; nothing where it has no content."""
    inside = "".join(content)
    return Html(f"<h2>{escape(title)}</h2>{inside}" if inside else "")


def fold(title: str, *content: str) -> Html:
    """Something that is opened by a click."""
    return Html(f"<details><summary>{escape(title)}</summary>{''.join(content)}</details>")


def paragraph(value: str, kind: str = "") -> Html:
    """A paragraph."""
    return Html(f"<p{f' class={kind!r}' if kind else ''}>{escape(value)}</p>")
