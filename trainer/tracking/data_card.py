"""What a run was trained on, written into its folder when it starts, so that a report needs no data. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.manifest import Dataset

FILE = "data.json"  # in the run's folder
SHOWN = 20  # classes of a page


def facts(dataset: Dataset) -> dict[str, Any]:
    """A data set as JSON: its splits with their fingerprints, its card, its classes."""
    splits = {
        name: {
            "samples": split.samples,
            "shards": len(split.counts),
            "bytes": sum(row.bytes for row in split.rows),
            "fingerprint": split.fingerprint,
            "sources": [
                {"root": one.root, "weight": one.weight, "samples": one.samples, "fingerprint": one.fingerprint}
                for one in split.sources
            ],
        }
        for name, split in dataset.splits.items()
    }
    return {
        "root": dataset.root,
        "label_kind": dataset.label_kind,
        "splits": splits,
        "card": dict(dataset.card),
        "label_counts": dataset.label_counts,
        "vocabulary": dataset.vocabulary,
        "resampled": dataset.resampled,
    }


def write(folder: Path, dataset: Dataset) -> None:
    """Write the facts into a run's folder."""
    (folder / FILE).write_text(json.dumps(facts(dataset)) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The facts in a run's folder, None where an older release left none."""
    path = folder / FILE
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for a page: kind of labels, splits, and what the data set's own card says."""
    found = [("data set", str(data["root"])), ("labels", f"{data['label_kind']}, {len(data['vocabulary']):,} classes")]
    for name, split in data["splits"].items():
        size = f", {split['bytes'] / 1e9:.3g} GB" if split["bytes"] else ""
        text = f"{split['samples']:,} samples in {split['shards']:,} shards{size}"
        found.append((f"split {name}", f"{text}; fingerprint {split['fingerprint'][:12]}"))
        found += [
            (f"of {name}", f"{one['root']}: {one['samples']:,} samples, weight {one['weight']}")
            for one in split["sources"]
        ]
    if data["resampled"]:
        found.append(("order", "tars drawn at random: not exact"))
    found += _plain("", data["card"])
    counts = data["label_counts"]
    if counts:
        least, most = min(counts), max(counts)
        found.append(
            ("training samples of a class", f"{least:,} to {most:,}, median {sorted(counts)[len(counts) // 2]:,}")
        )
    return found


def _plain(prefix: str, card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The entries of a card that fit a line each; lists of pictures that were left out do not."""
    found = []
    for name, value in card.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            flat = all(isinstance(inner, int | float | str) for inner in value.values())
            if flat and len(value) <= SHOWN:
                found.append((label, ", ".join(f"{key}: {inner}" for key, inner in value.items())))
            else:
                found += _plain(f"{label}, ", value)
        elif isinstance(value, str | int | float) and str(value):
            found.append((label, str(value)))
    return found
