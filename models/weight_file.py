"""Safetensors files that somebody else may have written: found, read and written without trusting them. No pickle."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import InputError
from models.timm_names import COUNTER

FOLDER_FILE = "model.safetensors"  # the weights' name in a folder that the Hugging Face hub or timm reads
ENDING = ".safetensors"
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".tar")


def located(path: Path) -> Path:
    """The safetensors file that a path means: itself, or the one in a folder.

    Raises:
        InputError: there is none, or it is a pickle, with how to convert it.
    """
    file = path / FOLDER_FILE if path.is_dir() else path
    pickles = [other for other in path.iterdir() if other.suffix in PICKLES] if path.is_dir() else []
    suspect = file if file.suffix in PICKLES else next(iter(sorted(pickles)), file)
    if suspect.suffix in PICKLES and (suspect is file or not file.is_file()):
        raise InputError(
            f"{suspect}: is a pickle, which can run any code when it is read, and is not taken. Where you trust it, "
            f'convert it: python -c "import sys, torch; from safetensors.torch import save_file; '
            f"save_file(torch.load(sys.argv[1], weights_only=True), 'model.safetensors')\" {suspect}"
        )
    if (path / "run.json").is_file() and not file.is_file():
        raise InputError(f"{path}: is a run folder; `coatnet export {path}` writes its weights as a file")
    if not file.is_file():
        raise InputError(f"{file}: no such file; `coatnet export RUN` writes one")
    return file


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of any safetensors file. The values are mapped from the file, not read yet.

    Raises:
        InputError: the file cannot be read, is damaged, or holds numbers that are no weights.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            header = dict(stored.metadata() or {})
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 -- no mapping
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"{file}: is no intact safetensors file: {error}; copy or export it again") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(COUNTER):
            raise InputError(f"{file}: {name} holds {tensor.dtype}, weights are floating point")
    return header, tensors


def save(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], force: bool = False) -> None:
    """Write a safetensors file aside, then give it its name.

    Args:
        metadata: one key at most makes equal contents equal bytes; several come in no fixed order.
        force: replace a file that is there.

    Raises:
        InputError: see `check_out`; or it cannot be written.
    """
    check_out(file, force)
    aside = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        usual = stat.S_IMODE(aside.stat().st_mode)
        save_file(dict(tensors), aside, metadata)
        aside.chmod(usual)  # safetensors lets nobody but the owner read
        os.replace(aside, file)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{file}: cannot be written: {error}; choose another --out") from None


def check_out(file: Path, force: bool) -> None:
    """Refuse a file to write.

    Raises:
        InputError: it is there, or its ending is a pickle's, which `located` refuses.
    """
    if file.suffix in PICKLES:
        raise InputError(f"{file}: the ending {file.suffix} is a pickle's; nearest valid: {file.with_suffix(ENDING)}")
    if file.exists() and not force:
        raise InputError(f"{file}: is there already; --force replaces it, --out chooses another name")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a small text file.

    Raises:
        InputError: it cannot be read or holds no object.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{file}: must hold a JSON object")
    return document


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a weight that is not finite.

    Raises:
        InputError: naming the file and the tensor.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{where}: {name} has {bad} of {tensor.numel()} values that are not finite (NaN or infinite); take an "
                f"earlier checkpoint or another file"
            )
