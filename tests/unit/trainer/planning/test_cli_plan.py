"""The command: what it prints, what it refuses, and that it needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError
from trainer.cli import main
from trainer.commands.plan import counts_of


@pytest.fixture(autouse=True)
def nobody_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_one_number_of_devices(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "coatnet4-in21k-224", "--gpus", "16", "--gpu", "a100", "--price", "1.5", "--best", "2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("16 x a100 (2 machines of 8, 400 Gb/s of network for each device): 73.6 GB a rank")
    assert "USD" in shown
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["best"]) == 2
    assert document["data"]["classes"] == 21841
    assert document["machines"]["device"]["source"].startswith("NVIDIA A100")


def test_fields_change_the_recipe_and_options_the_machines(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "coatnet0-in1k-224", "--gpus", "8", "--gpu", "h100", "--json"]
    found = []
    for more in ([], ["--model.name", "coatnet2"], ["--nodes", "4", "--nic", "10"], ["--samples", "2562334"]):
        assert main([*base, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    steps = [document["best"][0]["step"]["total"] for document in found]
    assert steps[1] > 2 * steps[0]
    assert found[2]["machines"]["nodes"] == 4
    assert steps[2] > steps[0]
    assert found[3]["best"][0]["days"] == pytest.approx(2 * found[0]["best"][0]["days"], rel=1e-3)


def test_a_scale_study_draws_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "coatnet0-in1k-224", "--gpus", "8..32", "--gpu", "h100"]
    assert main([*words, "--svg", str(tmp_path / "scale.svg")]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["devices", "8", "16", "32"]
    assert (tmp_path / "scale.svg").read_text().startswith("<svg xmlns")
    assert main([*words, "--json"]) == 0
    assert [row["devices"] for row in json.loads(capsys.readouterr().out)["points"]] == [8, 16, 32]


def test_the_ceilings_of_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "coatnet7-jft3b-224", "--gpus", "1", "--gpu", "h200", "--roofline"]) == 0
    assert "on one h200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coatnet0-in1k-224", "--gpu", "h100"], "--gpus N says"),
        (["coatnet0-in1k-224", "--gpus", "eight", "--gpu", "h100"], "must be N, N,N,... or A..B"),
        (["coatnet0-in1k-224", "--gpus", "8", "--gpu", "h1000"], "did you mean 'h100'"),
        (["coatnet0-in1k-224", "--gpus", "8", "--gpu", "h100", "--nodes", "3"], "--nodes 3: must divide the 8"),
        (["coatnet0-in1k-224", "--gpus", "2", "--gpu", "cpu", "--nodes", "2"], "this machine alone"),
        (["coatnet0-in1k-224", "--gpus", "8", "--gpu", "h100", "--svg", "x.svg"], "--svg"),
        (["coatnet0-in1k-224", "--gpus", "8", "--gpu", "h100", "--nic", "0"], "--nic"),
        (
            ["coatnet0-in1k-224", "--gpus", "8", "--gpu", "h100", "--parallel.zerro", "1"],
            "did you mean 'parallel.zero'",
        ),
        (["--gpus", "8"], "the recipe comes first"),
        (["coatnet7-jft3b-224", "--gpus", "1", "--gpu", "a10", "--model.resolution", "512"], "the smallest cluster"),
    ],
)
def test_what_makes_no_plan_is_76(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 76
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--price", "-2.5", "must be finite and not negative"),
        ("--price", "inf", "must be finite and not negative"),
        ("--price", "nan", "must be finite and not negative"),
        ("--nic", "-1", "must be positive and finite, in Gb/s"),
        ("--nic", "inf", "must be positive and finite, in Gb/s"),
        ("--nic", "nan", "must be positive and finite, in Gb/s"),
        ("--cluster.price", "-2.5", "must be at least 0"),
        ("--cluster.price", "inf", "must be a finite number"),
        ("--samples", "-5", "must be at least 4096"),
        ("--classes", "0", "must be at least 2"),
        ("--best", "0", "must be at least 1"),
    ],
)
@pytest.mark.parametrize("gpus", ["8", "8..32"])
def test_numbers_that_nothing_has_are_refused(
    gpus: str, option: str, value: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "coatnet0-in1k-224", "--gpus", gpus, "--gpu", "h100", f"{option}={value}"]) == 76
    words = capsys.readouterr().err
    assert words.startswith(f"coatnet: {option.removeprefix('--') if '.' in option else option} = ")
    assert f"{float(value):g}" in words
    assert rule in words


@pytest.mark.parametrize(("gpus", "nodes", "size"), [("1", [], 8), ("2,4", [], 8), ("8", ["--nodes", "2"], 4)])
def test_the_smallest_cluster_is_of_machines_as_they_are_sold(
    gpus: str, nodes: list[str], size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "coatnet7-jft3b-224", "--gpus", gpus, "--gpu", "a10", "--model.resolution", "512", *nodes]
    assert main(words) == 76
    assert f"devices that would: 16 x a10 ({16 // size} machines of {size}, 400 Gb/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "counts"), [("8", [8]), ("64,8,8", [8, 64]), ("8..64", [8, 16, 32, 64]), ("3..20", [3, 6, 12])]
)
def test_numbers_of_devices(words: str, counts: list[int]) -> None:
    assert counts_of(words) == counts


@pytest.mark.parametrize("words", ["8..8", "64..8", "0", "-1", "8,", "1..2..3"])
def test_numbers_that_are_none(words: str) -> None:
    with pytest.raises(InputError):
        counts_of(words)


def test_a_login_node_needs_no_torch() -> None:
    code = (
        "import sys; from trainer.cli import main\n"
        "code = main(['plan', 'coatnet7-jft3b-224', '--gpus', '64', '--gpu', 'h100'])\n"
        "assert code == 0 and 'torch' not in sys.modules, code"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
