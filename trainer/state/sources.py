"""What a checkpoint's files hold, read piece by piece: no more of it is in memory than what is asked for."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from configs.errors import InputError
from trainer.state.durable import manifest_files


class CheckpointError(InputError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class _Part(NamedTuple):
    """A piece of a parameter: its elements [offset, offset + length) lie from `place` on in a file's tensors."""

    offset: int
    length: int
    place: int
    file: Path


class Sources:
    """The fragments of a checkpoint, found by parameter name.

    Attributes:
        sizes: elements held of each parameter.
        kinds: "value", "exp_avg", ...: what is held of every element.
    """

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: it is not whole, or an element is held twice.
        """
        self.path = path
        self._parts: dict[str, list[_Part]] = {}
        self._open: dict[Path, Any] = {}
        kinds: set[str] = set()
        for index in listed(path, "rank-", ".json"):
            place, file = 0, index.with_suffix(".safetensors")
            for name, offset, length in json.loads(index.read_text()):
                self._parts.setdefault(name, []).append(_Part(offset, length, place, file))
                place += length
            kinds.update(self._opened(file).keys() if place else ())
        self.kinds = sorted(kinds)
        self.sizes = {name: sum(part.length for part in parts) for name, parts in self._parts.items()}
        for name, parts in self._parts.items():
            parts.sort()
            for first, later in pairwise(parts):
                if first.offset + first.length > later.offset:
                    raise CheckpointError(f"{later.file}: holds elements of {name} from {later.offset} on once more")

    def fill(self, kind: str, name: str, offset: int, target: Tensor) -> None:
        """Copy elements [offset, offset + len(target)) of a parameter's `kind` into `target` (1-D, on any device).

        Raises:
            CheckpointError: they are not all there.
        """
        end, filled = offset + target.numel(), 0
        for start, length, place, file in self._parts.get(name, []) if kind in self.kinds else ():
            low, high = max(offset, start), min(end, start + length)
            if low < high:
                stored = self._opened(file).get_slice(kind)
                target[low - offset : high - offset].copy_(stored[place + low - start : place + high - start])
                filled += high - low
        if filled != target.numel():
            raise CheckpointError(
                f"{self.path}: holds {filled} of the {target.numel()} elements of {name} ({kind}) from {offset} on; "
                f"it belongs to another model"
            )

    def _opened(self, file: Path) -> Any:
        """A file, mapped once."""
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]


def load_buffers(path: Path, wanted: dict[str, Tensor]) -> None:
    """Fill buffers from the files of all stages, by name.

    Raises:
        CheckpointError: one that is wanted is not there, or has another size.
    """
    missing = set(wanted)
    for file, name, value in buffers(path, missing):
        target = wanted[name]
        if value.shape != target.shape:
            raise CheckpointError(f"{file}: {name} has shape {tuple(value.shape)}, the model {tuple(target.shape)}")
        target.copy_(value)
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{path}/buffers*.safetensors: have no {min(missing)}; they belong to another model")


def buffers(path: Path, wanted: set[str] | None = None) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, value) of the buffers of all stages; of those that are `wanted` if it is given."""
    for file in listed(path, "buffers-", ".safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in sorted(set(stored.keys()) if wanted is None else wanted & set(stored.keys())):
                yield file, name, stored.get_tensor(name)


def listed(path: Path, stem: str, ending: str) -> list[Path]:
    """The files of a kind that the manifest lists; one that merely lies there was verified by nobody.

    Raises:
        CheckpointError: the manifest is not whole.
    """
    files = manifest_files(path)
    if isinstance(files, str):
        raise CheckpointError(f"{path}: {files}")
    return [path / name for name in sorted(files) if name.startswith(stem) and name.endswith(ending)]
