"""The data card of a build: statistics for programs (in the manifest) and a page for people (CARD.md)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from data_pipeline.building.build import CARD_HEADING
from data_pipeline.building.plan import Plan
from data_pipeline.manifest import Row

SHOWN = 20  # classes, reasons and left-out pictures that the page names


class ShardFacts(Protocol):
    """What a finished shard says of itself (`data_pipeline.building.tasks.Record`)."""

    formats: dict[str, int]
    sides: dict[str, int]
    resized: int
    skipped: list[str]
    fetched: list[str]


def summary(made: Plan, records: Mapping[str, Sequence[ShardFacts]], counts: Sequence[int]) -> dict[str, object]:
    """The statistics, JSON values: what the source held, what was left out, formats, short sides, labels.

    Args:
        made: the plan, for what was left out before the shards were written.
        records: of all shards, by split.
        counts: training pictures of each class, (classes,).
    """
    shards = [record for listed in records.values() for record in listed]
    fetched = Counter(found for record in shards for found in record.fetched)
    skipped = [line for record in shards for line in record.skipped]
    return {
        "listed": made.counts["listed"],
        "unreadable": made.counts["unreadable"] + len(skipped),
        "unreadable_shown": skipped[:SHOWN],
        "duplicates_removed": made.counts["duplicates"],
        "duplicates_of_other_label": made.counts["conflicting"],
        "duplicates_left": sum(count - 1 for count in fetched.values()),  # among URLs, which only tasks fetch
        "resized": sum(record.resized for record in shards),
        "formats": _added(record.formats for record in shards),
        "short_sides": _added(record.sides for record in shards),
        "labels": {
            "classes": len(counts),
            "classes_without_training_pictures": sum(count == 0 for count in counts),
            "fewest": min(counts),
            "median": sorted(counts)[len(counts) // 2],
            "most": max(counts),
        },
    }


def card_page(made: Plan, card: Mapping[str, object], rows: Mapping[str, Sequence[Row]], counts: Sequence[int]) -> str:
    """The page, Markdown."""
    facts = card["statistics"]
    assert isinstance(facts, dict)
    lines = [CARD_HEADING, "", f"Source: {card['source']}. {made.label_kind.capitalize()} labels.", ""]
    lines += ["| split | samples | shards | bytes |", "|---|---|---|---|"]
    for split, listed in rows.items():
        size = sum(row.bytes for row in listed)
        lines.append(f"| {split} | {sum(row.samples for row in listed)} | {len(listed)} | {size} |")
    lines += ["", "| fact | value |", "|---|---|"]
    for name, value in facts.items():
        shown = ", ".join(f"{key}: {count}" for key, count in value.items()) if isinstance(value, dict) else value
        if not isinstance(value, list):
            lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    if made.short_side:
        lines += ["", f"Pictures with a larger short side are stored at {made.short_side} pixels, JPEG {made.quality}."]
    lines += ["", f"Training pictures of the {min(SHOWN, len(counts))} largest classes:", ""]
    largest = sorted(range(len(counts)), key=lambda number: (-counts[number], number))[:SHOWN]
    lines += [f"- {made.vocabulary[number]}: {counts[number]}" for number in largest]
    if facts["unreadable_shown"]:
        lines += ["", "Left out, the first:", "", *(f"- {line}" for line in facts["unreadable_shown"])]
    return "\n".join(lines) + "\n"


def _added(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of tables of counts, by name."""
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(sorted(total.items()))
