"""A rank's part of a checkpoint in memory, and the writing of its files.

A snapshot is views of the live state, to be written before anything changes it, or a copy in the host's memory
(`trainer/state/host_memory.py`), to be written while training goes on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.cluster import Member
from trainer.engine.deepspeed_fragments import Fragment
from trainer.state.durable import FORMAT, sync, write_tensors, write_text


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes.

    Attributes:
        state: the run's small state as JSON, of the moment it was taken; the first rank's is written.
        intervals: (parameter name, offset in it, length) of the fragments, in the order of the tensors.
        kinds: "value", "exp_avg", ...: 1-D tensors of one dtype to be laid end to end.
        buffers: BatchNorm's running statistics, by name.
    """

    state: str
    intervals: list[tuple[str, int, int]]
    kinds: dict[str, list[Tensor]]
    buffers: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Size of the tensors; the small files come on top."""
        parts = [part for parts in self.kinds.values() for part in parts] + list(self.buffers.values())
        return sum(part.numel() * part.element_size() for part in parts)

    def write(self, aside: Path, member: Member) -> dict[str, list[Any]]:
        """Write this rank's files, to be found there after a power cut; returns {name: [bytes, sha256]}."""
        stem = f"rank-{member.rank:05d}"
        files = {
            f"{stem}.safetensors": write_tensors(aside / f"{stem}.safetensors", self.kinds),
            f"{stem}.json": write_text(aside / f"{stem}.json", json.dumps(self.intervals)),
        }
        if member.replica == 0:
            name = f"buffers-{member.stage:02d}.safetensors"
            files[name] = write_tensors(aside / name, {key: [value] for key, value in self.buffers.items()})
        if member.first:
            files["state.json"] = write_text(aside / "state.json", self.state)
        sync(aside)
        return files


def of(state: dict[str, Any], fragments: list[Fragment], buffers: dict[str, Tensor]) -> Snapshot:
    """A snapshot that only looks at the live tensors."""
    kinds: dict[str, list[Tensor]] = {"value": []}
    for fragment in fragments:
        for kind, part in {"value": fragment.value, **fragment.moments}.items():
            kinds.setdefault(kind, []).append(part.detach())
    intervals = [(fragment.name, fragment.offset, fragment.value.numel()) for fragment in fragments]
    # Text, not the state itself: what it refers to goes on changing while a thread writes it.
    return Snapshot(json.dumps({"format": FORMAT, **state}, indent=1), intervals, kinds, buffers)
