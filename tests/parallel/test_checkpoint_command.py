"""`coatnet checkpoint` on checkpoints of real ranks: ours and DeepSpeed's, of the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models import interop, spec
from tests.parallel.deepspeed_worker import COATNETS, OTHERS
from trainer import cli
from trainer.launch import free_port, launch

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left: a folder for each of `COATNETS` and `OTHERS`."""
    out = tmp_path_factory.mktemp("made")
    code = launch(["tests.parallel.deepspeed_worker", str(out)], 2, out / "logs", free_port(), True)
    assert code == 0, (out / "logs" / "rank-00000.log").read_text()
    return out


@pytest.fixture(autouse=True)
def _known_networks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the one that the workers' file adds, which is coatnet-nano under another name."""
    monkeypatch.delitem(spec.SPECS, "parity")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The run folder of two ZeRO-3 ranks, to be spoilt."""
    shutil.copytree(made / "zero3", tmp_path / "zero3")
    return tmp_path / "zero3"


def command(*words: object) -> int:
    return cli.main(["checkpoint", *map(str, words)])


def as_json(capsys: Capture, *words: object) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    command(*words, "--json")
    return json.loads(capsys.readouterr().out)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_ls_tells_the_layout_and_why_each_stays(copy: Path, capsys: Capture) -> None:
    (copy / "checkpoints" / "step-00000004.partial").mkdir()
    (copy / "checkpoints" / "step-00000003" / "COMPLETE").unlink()
    found = as_json(capsys, "ls", copy)
    assert [row["step"] for row in found] == [2, 3, 4]
    assert [found[0][name] for name in ("ranks", "pipeline", "zero", "kept")] == [2, 1, 3, ["newest"]]
    assert found[0]["bytes"] > 4 * 4 * 290_000  # value, two moments and average of every element
    assert ["COMPLETE is missing" in found[1]["problem"], "written" in found[2]["problem"]] == [True, True]
    assert command("ls", copy) == 0
    assert "2 ranks, ZeRO-3" in capsys.readouterr().out


def test_verify_names_every_damaged_file(copy: Path, capsys: Capture) -> None:
    assert command("verify", copy) == 0
    assert capsys.readouterr().out.count("whole") == 2
    step = copy / "checkpoints" / "step-00000003"
    for name in ("rank-00001.safetensors", "state.json"):
        content = bytearray((step / name).read_bytes())
        content[len(content) // 3] ^= 16
        (step / name).write_bytes(content)
    assert command("verify", copy) == 1
    said = capsys.readouterr().out
    assert all(f"DAMAGED {step}: {name}" in said for name in ("rank-00001.safetensors", "state.json"))
    assert command("verify", copy / "checkpoints" / "step-00000002") == 0
    assert [len(row["damage"]) for row in as_json(capsys, "verify", copy)] == [0, 2]


def test_diff_finds_the_one_element_that_was_changed(made: Path, capsys: Capture) -> None:
    folders = [made / "zero3" / "checkpoints" / f"step-0000000{step}" for step in (2, 3)]
    found = as_json(capsys, "diff", *folders)
    assert found["steps"] == [2, 3]
    assert [found["config"], found["only"]] == [[], []]
    (row,) = found["tensors"]
    assert [row["kind"], row["differ"]] == ["value", 1]
    assert row["largest"] == pytest.approx(0.5, rel=1e-6)
    assert found["equal"] == 4 * 112 - 1 + 2 * 20  # parameters, and running statistics with their averages
    assert command("diff", *folders) == 1
    assert f"value {row['name']}: 1 of" in capsys.readouterr().out
    assert command("diff", folders[0], folders[0]) == 0


def test_diff_of_two_layouts_finds_rounding_only(made: Path, capsys: Capture) -> None:
    one, other = (made / name / "checkpoints" / "step-00000002" for name in ("zero0", "stages"))
    found = as_json(capsys, "diff", one, other)
    assert {row[0] for row in found["config"]} == {"parallel.zero", "parallel.pipeline"}
    assert found["only"] == []
    assert max(row["largest"] for row in found["tensors"] if row["kind"] == "value") < 1e-5


@pytest.mark.parametrize("name", COATNETS)
def test_a_coatnet_of_deepspeeds_is_converted_to_the_bit(name: str, made: Path, tmp_path: Path) -> None:
    """The fp32 weights and statistics that the trainer saved at the same moment, with a card that loads them."""
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    assert command("convert", made / name / "theirs", "--out", theirs) == 0
    step = made / name / "checkpoints" / "step-00000002"
    assert command("convert", step, "--out", ours, "--weights", "raw") == 0
    found, wanted = interop.read(theirs), interop.read(ours)
    assert same(dict(found.tensors), dict(wanted.tensors))
    assert (found.card.spec, found.card.resolution, found.card.classes) == (wanted.card.spec, (32, 32), 7)
    assert (found.card.step, wanted.card.step) == (2, 2)
    assert interop.load_model(theirs)(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_in_bf16_is_converted_from_its_fp32_weights(name: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "other.safetensors"
    assert command("convert", made / name / "theirs", "--out", out) == 0
    found, wanted = load_file(out), load_file(made / name / "whole.safetensors")
    assert found["unembed.weight"].equal(found["embed.weight"])
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert found["embed.weight"].dtype == torch.float32
    assert not found["embed.weight"].bfloat16().float().equal(found["embed.weight"])  # not the rounded ones
    assert found["fixed.weight"].shape == (3, 5)
    assert int(found["calls"]) == 3


def test_all_that_a_checkpoint_holds_in_one_file(made: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{name}.safetensors" for name in ("zero1", "zero3")]
    for out in outs:
        assert command("convert", made / out.stem, "--out", out, "--weights", "all") == 0
    tensors = load_file(outs[0])
    kinds = {name.partition("/")[0] for name in tensors}
    assert kinds == {"value", "exp_avg", "exp_avg_sq", "ema"}
    assert tensors["exp_avg/blocks.s0.0.conv1.weight"].shape == (16, 3, 3, 3)
    assert tensors["ema/blocks.s0.0.norm.running_var"].shape == (16,)
    assert load_file(outs[1]).keys() == tensors.keys()
    with safe_open(outs[0], framework="pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 3


BAD = {
    "flip": "does not have the bytes of its checksum",
    "cut": "cannot be read",
    "lost": "has optimizer files of 1 ranks, [2] wrote it",
    "code": "cannot be read as tensors and plain values",
}


@pytest.mark.parametrize("damage", BAD)
def test_damaged_and_hostile_files_of_deepspeeds_are_refused(
    damage: str, copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    victim = next((copy / "theirs").rglob("zero_pp_rank_1*_optim_states.pt"))
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "lost":
        victim.unlink()
    else:
        torch.save({"optimizer_state_dict": Hostile()}, victim)
    out = tmp_path / "out.safetensors"
    assert command("convert", copy / "theirs", "--out", out) == 76
    assert BAD[damage] in capsys.readouterr().err
    assert not out.exists()
    assert not Hostile.ran


class Hostile:
    """Runs code when it is unpickled by a reader that lets it."""

    ran = False

    def __reduce__(self) -> Any:
        """What a pickle would call."""
        return exec, ("from tests.parallel.test_checkpoint_command import Hostile; Hostile.ran = True",)


def test_wrong_words_are_refused(made: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.safetensors"
    for words, told in (
        (("list", made), "did you mean 'ls'"),
        (("ls", tmp_path), "run.json"),
        (("verify", tmp_path), "neither a run folder nor a checkpoint's"),
        (("diff", made / "zero1"), "takes two paths, not 1"),
        (("convert", made / "zero1"), "needs --out FILE"),
        (("convert", tmp_path, "--out", out), "no folder that DeepSpeed saved to"),
        (("convert", made / "zero1" / "theirs", "--out", out, "--tag", "nope"), "there are: global_step2"),
        (("convert", made / "zero1", "--out", out, "--tag", "x"), "has no effect here"),
        (
            ("convert", made / "zero1" / "theirs", "--out", out, "--recipe", "coatnet0-in1k-224"),
            "its tensors are not those of coatnet0",
        ),
        (("convert", made / "zero1", "--out", tmp_path / "x.pt"), "nearest valid"),
    ):
        assert command(*words) == 76
        assert told in capsys.readouterr().err
