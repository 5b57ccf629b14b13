"""The benchmark of a training step: both sides are the same function, and what it reports follows from its samples."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import InputError
from models import coatnet, spec
from models.design import Stride
from trainer import cli
from trainer.bench import record as bench
from trainer.bench.model import Settings, check, measure, timm_twin
from trainer.commands import bench as command
from trainer.commands import words

TINY = Settings("coatnet-nano", True, 4, 32, None, ("fp32", "bf16"), ("none", "selective", "full"), rounds=3)


@pytest.fixture(scope="module")
def record() -> bench.Record:
    return measure(TINY)


def test_every_case_is_measured_in_every_round(record: bench.Record) -> None:
    ours = {f"ours {dtype}{kind}" for dtype in TINY.dtypes for kind in ("", " selective", " full")}
    assert record.samples.keys() == ours | {"timm fp32", "timm bf16"}
    for seconds in record.samples.values():
        assert len(seconds) == 3
        assert min(seconds) > 0


@pytest.mark.parametrize(("dtype", "band"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_all_cases_learn_alike(record: bench.Record, dtype: str, band: float) -> None:
    losses = record.config["losses"]
    ours = losses[f"ours {dtype}"]
    assert ours[-1] < ours[0] - 1  # four updates on one batch
    assert losses[f"ours {dtype} selective"] == losses[f"ours {dtype} full"] == ours
    assert losses[f"timm {dtype}"] == pytest.approx(ours, abs=band)


def test_held_bytes_are_the_counted_ones(record: bench.Record) -> None:
    assert record.config["held bytes"].keys() == record.config["counted bytes"].keys()
    for name, held in record.config["held bytes"].items():
        assert held == pytest.approx(record.config["counted bytes"][name], rel=0.05), name


def test_the_summary_follows_from_the_samples(record: bench.Record) -> None:
    samples, held = record.samples, record.config["held bytes"]
    ratio = statistics.median(a / b for a, b in zip(samples["timm bf16"], samples["ours bf16"], strict=True))
    assert record.summary["speed over timm, bf16"].startswith(f"{ratio:.2f}x (median of 3 rounds")
    less = 1 - held["ours fp32 selective"] / held["ours fp32"]
    assert less > 0.45
    shown = record.summary["selective beside none, fp32"]
    assert f"{less:.1%} fewer bytes held" in shown
    assert shown.endswith("losses of 4 steps bitwise equal")
    assert "not a fair ratio" in record.summary["note"]  # batch 4


def test_the_command_of_a_record_measures_the_same(record: bench.Record) -> None:
    known = command.KNOWN
    options = words.options(
        "coatnet bench model", record.command.removeprefix("coatnet bench model ").split(), known, places=1
    )
    assert (*options[""], options["--dtype"], options["--recompute"]) == (TINY.name, [*TINY.dtypes], [*TINY.recompute])
    assert (options["--against"], options["--stride"]) == (["timm"], ["expansion"])
    assert [options[f"--{word}"] for word in ("batch", "resolution", "rounds", "threads")] == [
        ["4"],
        ["32"],
        ["3"],
        ["1"],
    ]


@pytest.mark.parametrize("stride", ["expansion", "depthwise"])
def test_the_twin_is_the_same_function(stride: Stride) -> None:
    found = replace(spec.get("coatnet-nano"), stride=stride)
    model = coatnet.build(found, resolution=64, classes=7)
    coatnet.initialise(model, 0, "cpu")
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model.eval()(x), timm_twin(model).eval()(x)
    assert float(ours.std()) > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_command_prints_and_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench model coatnet-nano --resolution 32 --batch 2 --rounds 2 --stride depthwise --json --out"
    threads = torch.get_num_threads()
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    written = bench.read(tmp_path / "model-coatnet-nano-bf16-depthwise.json")
    assert json.loads(capsys.readouterr().out)["samples"] == written.samples
    assert written.samples.keys() == {"ours bf16"}
    assert written.unit == "seconds of the process's CPU time per step"
    assert replace(TINY, threads=2).in_cpu_time is False


def test_translated_networks_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a translator that needs no compiler: the words and the cases, not the speed."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **more: real(model, **(more | {"backend": "aot_eager"})))
    record = measure(replace(TINY, dtypes=("fp32",), recompute=("none",), rounds=1, compiled=("ours", "timm")))
    losses = record.config["losses"]
    assert (
        record.samples.keys() == losses.keys() == {"ours fp32", "timm fp32", "ours fp32 compiled", "timm fp32 compiled"}
    )
    assert losses["ours fp32 compiled"] == pytest.approx(losses["ours fp32"], abs=1e-4)
    assert losses["timm fp32 compiled"] == pytest.approx(losses["timm fp32"], abs=1e-4)
    assert "ours fp32 compiled beside timm fp32 compiled" in record.summary
    assert record.command.endswith("--compiled ours timm --rounds 1 --threads 1 --device cpu")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("modle", "did you mean 'model'"),
        ("model coatnt0", "did you mean 'coatnet0'"),
        ("model --dtype fp16", "did you mean 'bf16'"),
        ("model --recompute selektive", "did you mean 'selective'"),
        ("model --recompute none none", "none is given twice"),
        ("model --batch 4 --batch 8", "--batch is given twice"),
        ("model --batch 1", "nearest valid: 2"),
        ("model --rounds", "--rounds needs a value"),
        ("model --round 3", "did you mean '--rounds'"),
        ("model coatnet0 coatnet1", "unexpected 'coatnet1'"),
        ("model --resolution 100", "nearest valid: 96"),
        ("model --compiled timm", "add --against timm"),
        ("model coatnet7 --against timm", "timm cannot express coatnet7"),
    ],
)
def test_wrong_words_are_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words.split()]) == 76
    assert said in capsys.readouterr().err


def test_a_missing_timm_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python does for a package that is not there
    with pytest.raises(InputError, match=r"pip install -e '\.\[timm\]'"):
        check(TINY)
    check(replace(TINY, against_timm=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(InputError, match="nearest valid: cpu"):
        check(replace(TINY, device="cuda"))
