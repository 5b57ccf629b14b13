"""Runs exported and imported by the command line, and what a warm start refuses, on a run folder without training."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from configs import resolve
from configs.errors import InputError
from configs.schema import Init, Run
from data_pipeline.synthetic import synthetic_dataset
from models import interop, spec
from models.card import Preprocessing
from trainer import cli
from trainer.cluster import Member
from trainer.engine import network
from trainer.engine.deepspeed_fragments import Fragment
from trainer.engine.ema import AVERAGE, running_statistics
from trainer.engine.engine import Engine
from trainer.plan import layout
from trainer.state import checkpoint, export, warm_start

DATASET = synthetic_dataset(3)


def run_of(name: str, runs: Path, **model: Any) -> Run:
    """A run of the nano network that keeps an average."""
    plain = resolve.load("demo-digits")
    return replace(
        plain, name=name, runs=str(runs), optim=replace(plain.optim, ema=0.99), model=replace(plain.model, **model)
    )


def save(folder: Path, run: Run, step: int, member: Member, poisoned: str = "") -> dict[str, dict[str, Tensor]]:
    """A checkpoint as a run writes it; returns its raw and its averaged tensors."""
    states: dict[str, dict[str, Tensor]] = {}
    for number, kind in enumerate(("raw", "ema")):
        model = network.bare(replace(run, seed=2 * step + number), 3, torch.device("cpu"))
        for buffer in running_statistics(model).values():
            buffer.add_(0.25 * (number + 1))
        if poisoned:
            model.state_dict()[poisoned].view(-1)[0] = torch.nan
        states[kind] = model.state_dict()
    names = [name for name, _ in model.named_parameters()]
    parts = [Fragment(name, 0, states["raw"][name].view(-1), {"ema": states["ema"][name].view(-1)}) for name in names]
    buffers = {name: tensor for name, tensor in states["raw"].items() if name not in names}
    buffers |= {AVERAGE + name: tensor for name, tensor in states["ema"].items() if name not in names}
    state = {
        "step": step, "config": resolve.digest(run), "vocabulary": list(DATASET.vocabulary), "versions": {"torch": "x"},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(resolve.to_json(run))
    checkpoint.save(folder / "checkpoints", step, state, parts, buffers, member)
    return states


@pytest.fixture
def folder(tmp_path: Path, member: Member) -> Path:
    """A run folder with checkpoints of steps 10 and 20 and the scores of step 20."""
    path = tmp_path / "runs" / "nano"
    for step in (10, 20):
        save(path, run_of("nano", tmp_path / "runs"), step, member)
    scores = {"step": 20, "eval/top1": 0.5, "eval_ema/top1": 0.75, "eval_ema/loss": float("nan")}
    (path / "evaluation.json").write_text(json.dumps(scores))
    return path


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def coatnet_command(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_the_average_of_the_newest_checkpoint_is_exported(
    folder: Path, tmp_path: Path, member: Member, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coatnet_command("export", folder, "--license", "mit") == 0
    out = folder / "export" / "nano-ema.safetensors"
    weights = interop.read(out)
    run = resolve.recorded(folder / "run.json")
    states = save(tmp_path / "twin", run, 20, member)
    assert same(dict(weights.tensors), states["ema"])
    card = weights.card
    assert (card.spec, card.resolution, card.labels) == (
        replace(spec.get("coatnet-nano"), published=card.spec.published), (64, 64), DATASET.vocabulary,
    )  # fmt: skip
    assert (card.weights, card.step, card.recipe, card.config) == ("ema", 20, "demo-digits", resolve.digest(run))
    assert (card.metrics, card.license, card.versions) == ({"top1": 0.75}, "mit", {"torch": "x"})
    assert card.preprocessing == Preprocessing(run.augment.mean, run.augment.std, "center", 1.0)
    said = capsys.readouterr().out
    assert "coatnet-nano at 64 x 64 px, 3 classes, averaged weights, demo-digits step 20" in said
    assert f'interop.load_model("{out}")' in said


def test_raw_weights_of_an_older_step(folder: Path, tmp_path: Path, member: Member) -> None:
    out = tmp_path / "raw.safetensors"
    assert coatnet_command("export", folder, "--weights=raw", "--step", "10", "--out", out) == 0
    weights = interop.read(out)
    assert same(
        dict(weights.tensors), save(tmp_path / "twin", resolve.recorded(folder / "run.json"), 10, member)["raw"]
    )
    assert (weights.card.weights, weights.card.step, weights.card.metrics) == ("raw", 10, {})  # scores are of step 20


def test_a_damaged_checkpoint_is_passed_over_or_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert export.of_run(folder).card.step == 10
    said = capsys.readouterr().err
    assert "passed over" in said
    assert "sha256" in said
    with pytest.raises(InputError, match="no checkpoint of step 20 that verifies; steps there: 10, 20"):
        export.of_run(folder, step=20)
    with pytest.raises(InputError, match="no checkpoint of step 15 that verifies; steps there: 10, 20"):
        export.of_run(folder, step=15)


def test_all_ways_out_and_back_in_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    plain, mapped, hub = (tmp_path / name for name in ("plain.safetensors", "timm.safetensors", "hub"))
    assert coatnet_command("export", folder, "--out", plain) == 0
    assert coatnet_command("export", folder, "--format", "timm", "--out", mapped) == 0
    assert coatnet_command("export", folder, "--format", "huggingface", "--out", hub) == 0
    for source in (plain, mapped, hub):
        back = tmp_path / "back.safetensors"
        assert coatnet_command("import", source, "--out", back, "--force") == 0
        assert back.read_bytes() == plain.read_bytes()
    again = tmp_path / "again"
    assert coatnet_command("export", plain, "--format", "huggingface", "--out", again) == 0
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (again / name).read_bytes() == (hub / name).read_bytes()
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    with torch.no_grad():
        expected = interop.load_model(plain)(pictures)
        assert expected.std() > 1e-3
        torch.testing.assert_close(theirs(pictures), expected)


def test_import_replaces_the_classifier_on_request_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = export.export(folder)[0], tmp_path / "out.safetensors"
    assert coatnet_command("import", source, "--classes", "7", "--out", out) == 76
    assert "blocks.head.0.classifier.weight has 3 classes, --classes wants 7; --head reset" in capsys.readouterr().err
    assert not out.exists()
    assert coatnet_command("import", source, "--classes", "7", "--head", "reset", "--out", out) == 0
    assert interop.load_model(out)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


BAD = {
    "nothing": (["export", "runs/none"], "no run folder and no file"),
    "format": (["export", "{run}", "--format", "onnx"], "unknown value of --format 'onnx'"),
    "option": (["export", "{run}", "--wieghts", "raw"], "did you mean '--weights'"),
    "value": (["export", "{run}", "--out"], "--out needs a value"),
    "twice": (["export", "{run}", "--step", "1", "--step", "2"], "--step is given twice"),
    "step": (["export", "{run}", "--step", "x"], "--step x: must be a whole number"),
    "two": (["export", "{run}", "{run}"], "takes one path, not 2"),
    "no average": (["export", "{plain}", "--weights", "ema"], "keeps no averaged weights (optim.ema = 0)"),
    "no place": (["export", "{run}", "--out", "/proc/none/x.safetensors"], "cannot be written"),
    "head": (["import", "{run}", "--head", "reset"], "needs --classes N"),
    "pickle": (["import", "weights.pth"], "is a pickle"),
    "no file": (["import", "none.safetensors"], "no such file"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_refused(what: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = folder.with_name("plain")
    shutil.copytree(folder, plain)
    text = (plain / "run.json").read_text()
    (plain / "run.json").write_text(text.replace('"ema": 0.99', '"ema": 0.0'))
    words, message = BAD[what]
    assert coatnet_command(*[word.format(run=folder, plain=plain) for word in words]) == 76
    assert message in capsys.readouterr().err
    assert not (folder / "export").exists()


def test_help_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("export", "import"):
        assert coatnet_command(command, "--help") == 0
        assert f"usage: coatnet {command}" in capsys.readouterr().out


def starting(path: Path, runs: Path, **init: Any) -> Run:
    """A run at 96 px that starts from `path`."""
    run = run_of("next", runs, resolution=96)
    return replace(run, init=replace(run.init, path=str(path), **init))


def filled(run: Run, member: Member) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network after a warm start, and what was said about it."""
    run = replace(run, parallel=replace(run.parallel, zero=0))
    plan = layout(run, 1)
    engine = Engine(network.in_layout(run, 3, plan, member), run, plan, member)
    facts = warm_start.warm_start(run, DATASET, engine)
    return engine.model.state_dict(), facts


@pytest.mark.parametrize("weights", ["auto", "raw", "ema"])
def test_a_run_and_its_export_start_the_same_network(
    weights: Any, folder: Path, tmp_path: Path, member: Member
) -> None:
    file = export.export(folder, choice=weights)[0]
    expected = interop.load_model(file, 96).state_dict()
    for source in (folder, file):
        run = starting(source, tmp_path / "runs", weights=weights)
        warm_start.check(run, DATASET)
        state, facts = filled(run, member)
        assert same(state, expected)
        assert (facts["path"], facts["of_step"], facts["resolution"]) == (str(source), 20, [64, 64])
        assert facts["weights"] == ("raw" if weights == "raw" else "ema")
        assert len(facts["digest"]) == 64


def test_reset_leaves_the_classifier_fresh(folder: Path, tmp_path: Path, member: Member) -> None:
    run = starting(folder, tmp_path / "runs", head="reset")
    state, _ = filled(run, member)
    fresh = network.bare(run, 3, torch.device("cpu")).state_dict()
    kept = interop.load_model(export.export(folder)[0], 96).state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, (fresh if name.startswith(interop.CLASSIFIER) else kept)[name]), name


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


REFUSED: dict[str, tuple[Callable[[Run], Run], Callable[[Path], object], str]] = {
    "no file": (lambda run: run, Path.unlink, "init.path = .*: no run folder and no file"),
    "cut": (lambda run: run, truncated, "no intact safetensors file"),
    "model": (
        lambda run: replace(run, model=replace(run.model, name="coatnet0")), str,
        "holds coatnet-nano, which is not the coatnet0 to fill: .*head_size is 16 there, 32 here.*first tensor",
    ),
    "bias": (
        lambda run: replace(run, model=replace(run.model, relative_bias="post")), str,
        "relative_bias is pre there, post here",
    ),
    "kind": (
        lambda run: replace(run, init=replace(run.init, weights="raw")), str, "init.weights = 'raw': .* holds ema",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_the_start(what: str, folder: Path, tmp_path: Path) -> None:
    change, damage, message = REFUSED[what]
    file = export.export(folder, out=tmp_path / "file.safetensors")[0]
    run = change(starting(file, tmp_path / "runs"))
    damage(file)
    with pytest.raises(InputError, match=message):
        warm_start.check(run, DATASET)


def test_other_classes_are_refused_before_the_start(folder: Path, tmp_path: Path) -> None:
    run = starting(folder, tmp_path / "runs")
    with pytest.raises(InputError, match=r"classifier.weight has 3 classes, 4 are wanted; --init.head reset"):
        warm_start.check(run, synthetic_dataset(4))
    warm_start.check(replace(run, init=replace(run.init, head="reset")), synthetic_dataset(4))


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, member: Member) -> None:
    name = "blocks.s2.1.expand.weight"
    bad = tmp_path / "runs" / "bad"
    save(bad, run_of("bad", tmp_path / "runs"), 5, member, poisoned=name)
    with pytest.raises(InputError, match=f"{name} has 1 of 4096 values that are not finite"):
        warm_start.check(starting(bad, tmp_path / "runs"), DATASET)
    with pytest.raises(InputError, match=f"{name} has 1 of 4096 values that are not finite"):
        filled(starting(bad, tmp_path / "runs"), member)
    with pytest.raises(InputError, match=f"{name} has 1 of 4096 values that are not finite"):
        export.export(bad)


def test_a_run_with_a_checkpoint_of_its_own_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    run = starting(tmp_path / "gone", tmp_path / "runs")
    with pytest.raises(InputError, match="no run folder and no file"):
        warm_start.check(run, DATASET)
    warm_start.check(replace(run, name="nano"), DATASET)


@pytest.mark.parametrize(("init", "message"), [
    (Init(head="reset"), "init.head = 'reset': init.path names no weights; nearest valid: 'keep'"),
    (Init(weights="ema"), "init.weights = 'ema': init.path names no weights; nearest valid: 'auto'"),
])  # fmt: skip
def test_settings_of_weights_without_weights_are_refused(init: Init, message: str, tmp_path: Path) -> None:
    run = replace(run_of("alone", tmp_path / "runs"), init=init)
    with pytest.raises(InputError, match=message):
        warm_start.check(run, DATASET)
    warm_start.check(replace(run, init=Init()), DATASET)


def test_made_up_pictures_check_the_speed_of_weights_with_other_class_names(folder: Path, tmp_path: Path) -> None:
    run = starting(folder, tmp_path / "runs")
    renamed = replace(DATASET, vocabulary=tuple(f"another {name}" for name in DATASET.vocabulary))
    real = replace(run, data=replace(run.data, synthetic=False))
    with pytest.raises(InputError, match="knows other classes"):
        warm_start.check(real, renamed)
    warm_start.check(replace(run, data=replace(run.data, synthetic=True)), renamed)
    with pytest.raises(InputError, match="3 classes, 4 are wanted"):
        warm_start.check(replace(run, data=replace(run.data, synthetic=True)), synthetic_dataset(4))
