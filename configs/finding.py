"""What a check of a machine found, how bad that is, and what to do about it. Python 3.9: nodes check themselves too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

LEVELS = ("good", "note", "warning", "bad")  # bad: a run will fail or be wrong here


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        name: what was looked at.
        level: one of LEVELS.
        said: what was found, in words and figures.
        advice: what to do about it; empty where there is nothing to do.
    """

    name: str
    level: str
    said: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level


def worst(findings: Sequence[Finding]) -> str:
    """The worst level among them; good for none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="good")


def page(findings: Sequence[Finding]) -> str:
    """The findings for a person, one a line, advice below it."""
    lines = []
    for finding in findings:
        mark = {"good": "ok", "bad": "BAD"}.get(finding.level, finding.level)
        lines.append(f"{mark:8s} {finding.name}: {finding.said}")
        if finding.advice:
            lines.append(f"{'':8s} -> {finding.advice}")
    return "\n".join(lines)


def rows(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings for programs."""
    return [asdict(finding) for finding in findings]
