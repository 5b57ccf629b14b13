"""DeepSpeed's own checkpoints, read tensor by tensor: ZeRO 0 to 3, of one or several model-parallel ranks.

They are pickles. This is the one place that unpickles, by torch's reader that takes tensors, plain containers and the
types below only; these become inert objects here, no line of DeepSpeed runs. The archives' own checksums, which
DeepSpeed's loader does not look at, are held against every byte first. Layouts as DeepSpeed 0.19 writes them.
"""

import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import InputError
from trainer.state.consolidate import Whole

MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class Inert:
    """Stands for a type of DeepSpeed's of which nothing but its arguments matters here."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """What a pickle says of its attributes is left aside."""


SAFE: list[Any] = [
    (Inert, f"deepspeed.{name}")
    for name in (
        "utils.tensor_fragment.fragment_address",
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
    )
]
SAFE.append((Inert, "builtins.getattr"))  # by which Python 3.11.0 to 3.11.3 wrote the members of an enumeration


def located(path: Path, tag: str = "") -> Path | None:
    """The folder with a checkpoint's files: `path` itself, or the one in it that `tag` or its file `latest` names.

    Raises:
        InputError: there is no such tag, with those that there are.
    """
    if any(MODEL.fullmatch(file.name) for file in path.glob("*_model_states.pt")):
        return path
    tags = sorted(folder.parent.name for folder in path.glob("*/*_rank_00_model_states.pt"))
    latest = path / "latest"
    wanted = tag or (latest.read_text().strip() if latest.is_file() else "")
    if not tags or not wanted:
        return None
    if wanted not in tags:
        raise InputError(f"{path}: no checkpoint {wanted!r}; there are: {', '.join(dict.fromkeys(tags))}")
    return path / wanted


def read(folder: Path) -> tuple[Whole, int, dict[str, str]]:
    """The whole fp32 weights and the buffers in a folder of DeepSpeed's; its step, and its versions.

    Raises:
        InputError: a file is missing, damaged, or holds what is not read here, by its name.
    """
    files = sorted(folder.iterdir())
    alien = next((file for file in files if file.name.startswith("layer_") or "expert" in file.name), None)
    if alien is not None:
        raise InputError(f"{alien}: DeepSpeed's PipelineModule and experts are not read; `zero_to_fp32.py` may do it")
    models = _numbered(files, MODEL)
    optimizers = _numbered(files, OPTIMIZER)
    parts: dict[str, _Part] = {}
    step, versions = 0, {}
    for place in sorted({place for _, place in models}):
        mine = [_load(file) for (_, number), file in sorted(models.items()) if number == place]
        states = {rank: _load(file) for (rank, number), file in sorted(optimizers.items()) if number == place}
        found = _of_place(mine, states, folder)
        twice = parts.keys() & found.keys()
        if twice:
            raise InputError(f"{folder}: {min(twice)} is in several model-parallel files; slices are not joined")
        parts |= found
        step = int(mine[0].get("global_steps", 0))
        versions = {"deepspeed": str(mine[0].get("ds_version", ""))}
    entries = {name: (part.pieces[0].dtype, part.shape) for name, part in parts.items()}
    return Whole(entries, (part.tensor() for part in parts.values())), step, versions


class _Part:
    """A tensor as its pieces, mapped from the files."""

    def __init__(self, name: str, shape: tuple[int, ...], pieces: list[Tensor]) -> None:
        self.shape, self.pieces = shape, pieces
        held = sum(len(piece) for piece in pieces)
        if held < math.prod(shape) or not pieces:
            raise InputError(f"{name}: {held} of its {math.prod(shape)} elements are in DeepSpeed's files")

    def tensor(self) -> Tensor:
        """The whole tensor, in memory."""
        return torch.cat(self.pieces)[: math.prod(self.shape)].view(self.shape)


def _numbered(files: list[Path], pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    """Files by (data-parallel rank, model-parallel rank)."""
    matches = ((file, pattern.fullmatch(file.name)) for file in files)
    return {(int(found[1] or 0), int(found[2])): file for file, found in matches if found}


def _load(file: Path) -> dict[str, Any]:
    """What a file holds, tensors mapped from it.

    Raises:
        InputError: it is damaged, or holds other types than `SAFE`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise InputError(f"{file}: is damaged: {bad} does not have the bytes of its checksum")
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes a reader throw
        raise InputError(f"{file}: cannot be read as tensors and plain values: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no dictionary; DeepSpeed did not write it")
    return content


def _of_place(models: list[dict[str, Any]], states: dict[int, dict[str, Any]], folder: Path) -> dict[str, _Part]:
    """The tensors of one model-parallel rank."""
    try:
        first, module = models[0], models[0]["module"]
        if first["param_shapes"] is not None and not states:
            raise InputError(f"{folder}: has no optimizer files, in which DeepSpeed keeps the fp32 weights")
        parts: dict[str, _Part] = {}
        if states:
            optimizers = [state["optimizer_state_dict"] for _, state in sorted(states.items())]
            _check_ranks(optimizers[0]["partition_count"], len(optimizers), folder)
            by_group = "single_partition_of_fp32_groups" in optimizers[0]  # not by ZeRO 3
            cut = (_by_group if by_group else _by_parameter)(first["param_shapes"], optimizers)
            parts |= {name: _Part(name, shape, pieces) for name, shape, pieces in cut}
            parts |= _frozen(models[:1] if by_group else models)
        for name in sorted(module.keys() - parts.keys()):  # buffers, and what nobody trains; ZeRO 3 leaves empty ones
            if module[name].numel() or name in first["buffer_names"]:
                parts[name] = _Part(name, tuple(module[name].shape), [module[name].reshape(-1)])
        for name, same in (first.get("shared_params") or {}).items():
            parts[name] = parts[same]
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(
            f"{folder}: is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: {error})"
        ) from None
    return parts


def _check_ranks(counts: Any, found: int, folder: Path) -> None:
    """Refuse a checkpoint of which files are missing, or left from another one."""
    wanted = {int(count) for count in (counts if isinstance(counts, list) else [counts])}
    if wanted != {found}:
        raise InputError(f"{folder}: has optimizer files of {found} ranks, {sorted(wanted)} wrote it")


Found = Iterator[tuple[str, tuple[int, ...], list[Tensor]]]  # name, shape, pieces


def _by_group(groups: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> Found:
    """ZeRO 1 and 2: the parameters of a group lie end to end, and that line is cut into one piece per rank."""
    paddings = optimizers[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for number, group in enumerate(groups):
        line = [optimizer["single_partition_of_fp32_groups"][number] for optimizer in optimizers]
        place = 0
        for (name, shape), padding in zip(group.items(), paddings[number], strict=True):
            yield name, tuple(shape), _stretch(line, place, math.prod(shape))
            place += math.prod(shape) + int(padding)


def _by_parameter(groups: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> Found:
    """ZeRO 3: every parameter is cut into equal pieces, one per rank, the last one padded."""
    lines = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
    place = 0
    for name, shape in (item for group in groups for item in group.items()):
        piece = -(-math.prod(shape) // len(lines))
        yield name, tuple(shape), [part for line in lines for part in _stretch(line, place, piece)]
        place += piece


def _frozen(models: list[dict[str, Any]]) -> dict[str, _Part]:
    """Parameters that were not trained: whole in one file, under ZeRO 3 a piece in each."""
    return {
        name: _Part(name, tuple(shape), [model["frozen_param_fragments"][name].reshape(-1) for model in models])
        for name, shape in (models[0].get("frozen_param_shapes") or {}).items()
    }


def _stretch(line: list[Tensor], first: int, count: int) -> list[Tensor]:
    """Elements [first, first + count) of tensors laid end to end."""
    pieces = []
    for part in line:
        low, high = max(first, 0), min(first + count, len(part))
        if low < high:
            pieces.append(part[low:high])
        first -= len(part)
    return pieces
