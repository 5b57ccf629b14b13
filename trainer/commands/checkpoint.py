"""`coatnet checkpoint ls|verify|diff|convert`: what is saved, whether it is whole, what differs, as one file."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from configs.errors import InputError, unknown
from trainer.commands import words

if TYPE_CHECKING:
    from models.card import Card
    from trainer.state.checkpoint import Saved
    from trainer.state.consolidate import Whole
    from trainer.state.export import Choice

SHOWN = 10  # tensors that `diff` lists

USAGE = """usage: coatnet checkpoint ls RUN [--json]
       coatnet checkpoint verify RUN_OR_STEP ... [--json]
       coatnet checkpoint diff A B [--json]
       coatnet checkpoint convert SOURCE --out FILE [--weights raw|ema|all] [--recipe RECIPE] [--tag TAG] [--force]

RUN is a run folder, STEP a folder of its checkpoints: runs/NAME/checkpoints/step-00001000. Nothing is a pickle, but for
the files of DeepSpeed that `convert` reads, by torch's reader for tensors and plain values alone.

ls       every checkpoint, the layout that wrote it, and why it stays: newest, every (checkpoint.keep_every), best,
         guard (a rollback may want it).
verify   reads every byte and holds it against the manifest's checksums; of a run all that are complete.
         exit codes: 0 all are whole; 1 some file is damaged: each is named
diff     settings, small state and every element of A against B, of which a run folder means its newest checkpoint;
         the layouts may differ, no more than a stretch of one tensor is in memory.
         exit codes: 0 the tensors, the settings and the small state are the same; 1 they are not
convert  one safetensors file of whole tensors. SOURCE is a RUN or STEP of ours, or a folder that DeepSpeed's
         save_checkpoint wrote (ZeRO 0 to 3, its files' own checksums are verified first).
  --weights raw|ema|all  of ours: the weights or their average (default: the average where the run keeps one) with a
                         model card, as `coatnet export` writes them; all: KIND/NAME with the kinds value, exp_avg,
                         exp_avg_sq and ema, and state.json in the header
  --recipe RECIPE        of DeepSpeed's: the recipe whose network it is, where its tensors' names and shapes do not
                         tell. Where they are a CoAtNet's, the file has a model card, and `--init.path` takes it
  --tag TAG              of DeepSpeed's: which of several, instead of the one that its file `latest` names
  --force                replace FILE

76: wrong words, no such checkpoint, or one that cannot be used"""


def checkpoint_command(arguments: list[str]) -> int:
    """`coatnet checkpoint ACTION ...`: returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE + "\n")
        return 0
    actions: dict[str, Callable[[list[str]], int]] = {"ls": _ls, "verify": _verify, "diff": _diff, "convert": _convert}
    if arguments[0] not in actions:
        raise unknown("coatnet checkpoint", arguments[0], actions)
    return actions[arguments[0]](arguments[1:])


def _ls(arguments: list[str]) -> int:
    """The checkpoints of a run."""
    names, options = words.parse("coatnet checkpoint ls", arguments, 1, ("--json",))
    from trainer.state.listing import rows

    found = rows(Path(names[0]))
    if "--json" in options:
        print(json.dumps(found))
        return 0
    if not found:
        print(f"{names[0]}: no checkpoints yet")
        return 0
    cells: list[tuple[str, ...]] = [("step", "saved", "size", "files", "written by", "stays as", "scores")]
    cells += [_cells(row) for row in found]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One checkpoint's line."""
    if row["problem"]:
        return (str(row["step"]), "no", "", "", "", row["problem"], "")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved"]))
    layout = f"{row['ranks']} ranks, ZeRO-{row['zero']}" + (
        f", pipeline {row['pipeline']}" if row["pipeline"] > 1 else ""
    )
    scores = ", ".join(f"{name} {value:.4g}" for name, value in sorted(row["scores"].items()))
    kept = "+".join(row["kept"]) or "goes next"
    return (str(row["step"]), when, f"{row['bytes'] / 1e9:.3f} GB", str(row["files"]), layout, kept, scores)


def _verify(arguments: list[str]) -> int:
    """Every byte of checkpoints."""
    names, options = words.parse("coatnet checkpoint verify", arguments, 0, ("--json",))
    from trainer.state.listing import targets, verified

    found = []
    for path in [path for name in names for path in targets(Path(name))]:
        found.append(verified(path))
        if "--json" not in options:
            _say_verified(found[-1])
    if "--json" in options:
        print(json.dumps(found))
    return 1 if any(row["damage"] for row in found) else 0


def _say_verified(row: Mapping[str, Any]) -> None:
    """What was found of one checkpoint."""
    if row["damage"]:
        print("\n".join(f"DAMAGED {row['path']}: {text}" for text in row["damage"]), flush=True)
        return
    rate = row["bytes"] / max(row["seconds"], 1e-9) / 1e9
    print(f"whole {row['path']}: {row['files']} files, {row['bytes'] / 1e9:.3f} GB at {rate:.2f} GB/s", flush=True)


def _diff(arguments: list[str]) -> int:
    """Two checkpoints."""
    names, options = words.parse("coatnet checkpoint diff", arguments, 2, ("--json",))
    from trainer.state.diff import compare

    with _opened(names[0]) as a, _opened(names[1]) as b:
        found = compare(a.path, b.path)
    alike = not (found["tensors"] or found["only"] or found["config"] or found["state"])
    if "--json" in options:
        print(json.dumps(found))
    else:
        print(f"a: {a.path}\nb: {b.path}\n{_differences(found)}")
    return 0 if alike else 1


def _differences(found: Mapping[str, Any]) -> str:
    """What differs, for a person."""
    lines = [f"step {found['steps'][0]}, step {found['steps'][1]}"]
    lines += [f"setting {key}: {a!r}, {b!r}" for key, a, b in found["config"]]
    lines += [f"state {key}: {_short(a)}, {_short(b)}" for key, a, b in found["state"] if key != "step"]
    lines += [f"only {text}" for text in found["only"]]
    far = sorted(found["tensors"], key=lambda row: -row["largest"])
    for row in far[:SHOWN]:
        lines.append(
            f"{row['kind']} {row['name']}: {row['differ']:,} of {row['elements']:,} elements, by {row['largest']:.4g} "
            f"at most (the largest is {row['scale']:.4g})"
        )
    lines += [f"and {len(far) - SHOWN} more tensors"] if len(far) > SHOWN else []
    return "\n".join([*lines, f"{found['equal']} tensors are the same to the bit, {len(far)} are not"])


def _short(value: Any) -> str:
    """A value in a few words."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _convert(arguments: list[str]) -> int:
    """A checkpoint as one file."""
    names, options = words.parse(
        "coatnet checkpoint convert", arguments, 1, ("--force",), ("--out", "--weights", "--recipe", "--tag")
    )
    if "--out" not in options:
        raise InputError("coatnet checkpoint convert: needs --out FILE")
    source, out = Path(names[0]), Path(options["--out"])
    from models.weight_file import check_out
    from trainer.state import consolidate, deepspeed_files

    check_out(out, "--force" in options)
    folder = deepspeed_files.located(source, options.get("--tag", ""))
    if folder is not None:
        whole, card = _of_deepspeed(folder, options)
        size = consolidate.write(out, whole, consolidate.header(card), "--force" in options)
    elif not (source / "run.json").is_file() and not source.name.startswith("step-"):
        raise InputError(f"{source}: neither a run folder nor a checkpoint's, and no folder that DeepSpeed saved to")
    else:
        _refuse(options, ("--recipe", "--tag"), "a checkpoint of ours says it itself")
        choice = options.get("--weights", "auto")
        if choice not in ("auto", "raw", "ema", "all"):
            raise unknown("value of --weights", choice, ("raw", "ema", "all"))
        with _opened(names[0]) as saved:
            if choice == "all":
                whole, card = consolidate.everything(saved), None
                metadata = {"state": json.dumps(saved.state)}
            else:
                whole, card = consolidate.weights(saved, cast("Choice", choice))
                metadata = consolidate.header(card)
            size = consolidate.write(out, whole, metadata, "--force" in options)
    named = f"{card.weights} weights of {card.spec.name}, {card.classes:,} classes" if card else "no model card"
    print(f"{out}: {len(whole.entries)} tensors, {size / 1e9:.3f} GB, {named}")
    return 0


def _of_deepspeed(folder: Path, options: Mapping[str, str]) -> "tuple[Whole, Card | None]":
    """The tensors of a checkpoint of DeepSpeed's, and their card where they are a CoAtNet's."""
    from dataclasses import replace

    from trainer.commands import config as cli_config
    from trainer.state import deepspeed_files, recognise

    _refuse(options, ("--weights",), "DeepSpeed's checkpoints hold the trained weights only")
    run = cli_config.resolve_command(options["--recipe"], []) if "--recipe" in options else None
    whole, step, versions = deepspeed_files.read(folder)
    card = recognise.card_of({name: shape for name, (_, shape) in whole.entries.items()}, str(folder), run)
    if card is None:
        return whole, None
    return whole, replace(card, step=step, versions=versions, recipe=run.recipe if run is not None else "")


@contextmanager
def _opened(name: str) -> "Iterator[Saved]":
    """Around the use of a checkpoint that verifies: of a run the newest, or the one whose folder is given."""
    from trainer.state import checkpoint, export, retention
    from trainer.state.listing import targets

    path = Path(name)
    if export.is_run(path):
        saved = export.saved_in(path)
    else:
        (folder,) = targets(path)
        held = retention.hold(folder)
        bad = checkpoint.damage(folder)
        if bad:
            raise InputError(f"{folder}: {bad}; `coatnet checkpoint verify` reads all of it")
        saved = checkpoint.opened(folder, held)
    try:
        yield saved
    finally:
        saved.hold.release()


def _refuse(options: Mapping[str, str], without_effect: tuple[str, ...], why: str) -> None:
    """Refuse options that would do nothing."""
    for option in without_effect:
        if option in options:
            raise InputError(f"coatnet checkpoint convert {option}: has no effect here: {why}")
