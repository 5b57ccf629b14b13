"""`coatnet export` and `coatnet import`: weights out and in."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from configs.errors import InputError, unknown
from trainer.commands import words

if TYPE_CHECKING:
    from models.card import Card
    from trainer.state.export import Choice, Format

EXPORT_USAGE = """usage: coatnet export RUN [--format safetensors|timm|huggingface|mlflow] [--out PATH]
                      [--weights raw|ema] [--step N] [--license TEXT] [--force]

Writes the weights in the newest verified checkpoint of the run folder RUN (or those in a file of `coatnet export`) for
others to load. Never a pickle; nothing is uploaded.

--format safetensors  one file with our tensors' names and a model card in its header: the network as data, resolution,
                      labels, recipe, scores, preprocessing, versions. `models.interop.load_model(FILE)` loads it,
                      `coatnet train --init.path FILE` starts from it
--format timm         the same file under timm's names: the state of timm's model of the same function, for every
                      network that timm can express (coatnet0 to coatnet5)
--format huggingface  a folder with config.json, model.safetensors and README.md, which
                      `timm.create_model("local-dir:FOLDER", pretrained=True)` loads offline; for networks that timm
                      cannot express the folder has our names, and models.interop loads it
--format mlflow       a model of MLflow: code, the same safetensors file, a signature; `mlflow models serve -m FOLDER
                      --env-manager local` answers with the classes of a picture
--out PATH            file or folder to write; default: RUN/export/NAME-WEIGHTS and an ending
--weights raw|ema     the trained weights or their moving average; default: the average where the run keeps one
--step N              the checkpoint after N updates; default: the newest that verifies
--license TEXT        the license to state in the model card; default: not stated
--force               replace what is there"""

IMPORT_USAGE = """usage: coatnet import FILE [--out FILE] [--head reset --classes N] [--force]

Reads weights and writes them as one file of ours, which `coatnet train --init.path` and `coatnet export` take. FILE is
a file of `coatnet export`, or timm's: a safetensors file with config.json beside it, or the folder of both. timm's
design must be the paper's as it is here; otherwise every difference is named. A pickle (.bin, .pth) is not read.

--out FILE            default: FILE's name with the ending -coatnet.safetensors, beside it
--head reset          a fresh classifier for --classes N other classes; the rest of the head stays
--classes N           the classes that the file must have, or with --head reset shall have
--force               replace what is there"""


def export_command(arguments: list[str]) -> int:
    """`coatnet export RUN ...`: returns the exit code."""
    valued = ("--format", "--out", "--weights", "--step", "--license")
    names, options = _parse("export", arguments, valued, EXPORT_USAGE)
    if not names:
        return 0
    form = _one_of("--format", options.get("--format", "safetensors"), ("safetensors", "timm", "huggingface", "mlflow"))
    choice = _one_of("--weights", options["--weights"], ("raw", "ema")) if "--weights" in options else "auto"
    step = _number("--step", options["--step"]) if "--step" in options else 0
    out = Path(options["--out"]) if "--out" in options else None
    from trainer.state.export import export

    path, card = export(
        Path(names[0]), cast("Format", form), out,
        choice=cast("Choice", choice), step=step, terms=options.get("--license", ""), force="--force" in options,
    )  # fmt: skip
    print(_described(path, card))
    print(_loading(path, card, form))
    return 0


def import_command(arguments: list[str]) -> int:
    """`coatnet import FILE ...`: returns the exit code."""
    names, options = _parse("import", arguments, ("--out", "--head", "--classes"), IMPORT_USAGE)
    if not names:
        return 0
    reset = "--head" in options and _one_of("--head", options["--head"], ("reset",)) == "reset"
    classes = _number("--classes", options["--classes"]) if "--classes" in options else 0
    if reset and not classes:
        raise InputError("coatnet import --head reset: needs --classes N, of which the new classifier is")
    from models import interop, timm_design

    source = Path(names[0])
    weights = timm_design.read_any(source)
    if reset:
        weights = interop.reset_classifier(weights, classes)
    elif classes and classes != weights.card.classes:
        raise InputError(
            f"{source}: {interop.CLASSIFIER}weight has {weights.card.classes} classes, --classes wants {classes}; "
            f"--head reset replaces the classifier"
        )
    stem = source.resolve().name if source.is_dir() else source.stem
    out = Path(options["--out"]) if "--out" in options else source.parent / f"{stem}-coatnet.safetensors"
    interop.write(out, weights, force="--force" in options)
    print(_described(out, weights.card))
    print(f"start from it: coatnet train RECIPE --init.path {out}")
    return 0


def _described(path: Path, card: "Card") -> str:
    """What was written, in a line."""
    height, width = card.resolution
    kind = "averaged" if card.weights == "ema" else "raw"
    origin = f", {card.recipe} step {card.step:,}" if card.recipe else ""
    return f"{path}: {card.spec.name} at {height} x {width} px, {card.classes:,} classes, {kind} weights{origin}"


def _loading(path: Path, card: "Card", form: str) -> str:
    """How somebody else loads it."""
    from models import timm_names

    if form == "mlflow":
        return f"serve it: mlflow models serve -m {path} --env-manager local -p 5001"
    if form == "safetensors" or timm_names.obstacles(card.spec):
        return f'load it: from models import interop; model = interop.load_model("{path}")'
    if form == "huggingface":
        return f'load it: import timm; model = timm.create_model("local-dir:{path}", pretrained=True)'
    changed = {"num_classes": card.classes, **timm_names.arguments(card.spec, card.resolution)}
    return (
        f'load it: import timm; model = timm.create_model("{timm_names.architecture(card.spec)}", **{changed}); '
        f'timm.models.load_checkpoint(model, "{path}")'
    )


def _parse(command: str, arguments: list[str], valued: tuple[str, ...], usage: str) -> tuple[list[str], dict[str, str]]:
    """The one name and the options of a command line; no name after the usage was printed.

    Raises:
        InputError: an unknown option, one without its value or given twice, or not exactly one name.
    """
    if not arguments or "-h" in arguments or "--help" in arguments:
        sys.stdout.write(usage + "\n")
        return [], {}
    return words.parse(f"coatnet {command}", arguments, 1, ("--force",), valued)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """The value, if it is known."""
    if value not in known:
        raise unknown(f"value of {option}", value, known)
    return value


def _number(option: str, value: str) -> int:
    """The value as a positive whole number."""
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{option} {value}: must be a whole number of at least 1")
    return int(value)
