"""`coatnet cost`: what a run folder says it cost, beside the paper's row, and the same from a small JSON."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs import resolve
from configs.errors import InputError
from trainer.commands.cost import cost_command
from trainer.cost import bill, statement
from trainer.cost.ledger import Holding, Ledger
from trainer.health.goodput import NS, Clock
from trainer.tracking.journal import Journal

H100 = Holding("NVIDIA H100 80GB HBM3", 989.4e12, 2.5, "USD", 700.0, "NVML")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CoAtNet-5 that was trained on 128 H100 for a day, of which an hour was lost, as its first rank left it."""
    run = replace(resolve.load("coatnet5-jft300m-224"), name="big", runs=str(tmp_path))
    made = tmp_path / "big"
    made.mkdir()
    (made / "run.json").write_text(resolve.to_json(run))
    now = 0
    clock = Clock(128, 0, now=lambda: now)
    ledger = Ledger(142_181_474_304, replace(H100), images=4_000_000_000, lost_images=180_000_000)
    clock.go_on(None)
    for kind, hours in (("productive", 22), ("lost", 1), ("save", 1)):
        with clock.of(kind):  # type: ignore[arg-type]
            now += hours * 3600 * NS
    ledger.held(clock.now())
    ledger.measured(128 * 23 * 3600 * 600.0, 128 * 23 * 3600.0)
    clock.ledger = ledger.state()
    Journal(made / "events" / "clock.jsonl", clock.line, every=60).close()
    return made


def test_figures_against_numbers_by_hand(folder: Path) -> None:
    found = bill.figures(bill.of_path(folder), bill.against(bill.of_path(folder)))
    by_hand: dict[str, Any] = {
        "images": 4_000_000_000,
        "model_flops": 6 * 142_181_474_304 * 4e9,  # 3.412e21
        "device_hours": 128 * 24,
        "mfu": 6 * 142_181_474_304 * 4e9 / (128 * 86400 * 989.4e12),  # 0.312
        "tpu_v3_core_days_flops": 3.4123553833e21 / (86400 * 61.5e12 * 0.3),
        "tpu_v3_core_days_flops_own_row": 1820 * 4.0 / 4.2,
        "tpu_v3_core_days_device": 128 * 989.4 / 61.5,
        "energy_kwh": 128 * 24 * 0.6,
        "money": 128 * 24 * 2.5,
        "lost_device_hours": 128,
        "lost_money": 320.0,
        "goodput": 22 / 24,
        "ratio_device": 128 * 989.4 / 61.5 / 1820,
    }
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-9)
    assert (found["lost_images"], found["currency"], found["against"]) == (180_000_000, "USD", "coatnet5-jft300m-224")


def test_the_table_says_it_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_command([str(folder)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "coatnet5 at 224 px", "paper: CoAtNet-5, JFT-300M", "3072 (3072 NVIDIA H100 80GB HBM3)", "7,680.00 USD",
        "1843 kWh (96% of the time measured by NVML, the rest at its mean)", "37.0%", "1,820",
        "180,000,000 images, 128 device-hours, 320.00 USD", "91.7% of it productive",
    ):  # fmt: skip
        assert words in shown
    assert cost_command([str(folder), "--against", "vit-g14-jft3b"]) == 0
    assert "30,000" in capsys.readouterr().out


def test_a_list_of_several_is_read_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost_command([str(folder), str(folder), "--json"])
    (tmp_path / "two.json").write_text(printed := capsys.readouterr().out)
    assert len(json.loads(printed)) == 2
    cost_command([str(tmp_path / "two.json"), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(printed)
    (tmp_path / "two.json").write_text("[3]")
    with pytest.raises(InputError, match="not a document"):
        cost_command([str(tmp_path / "two.json")])


def test_everything_follows_from_the_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost_command([str(folder), "--json"])
    printed = capsys.readouterr().out
    (document,) = json.loads(printed)
    document["figures"] = {}  # of no use to the reader
    (tmp_path / "small.json").write_text(json.dumps(document))
    assert len(json.dumps(document["facts"])) < 2000
    cost_command([str(tmp_path / "small.json"), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(printed)


def test_what_is_not_known_is_said(folder: Path) -> None:
    path = folder / "events" / "clock.jsonl"
    line = json.loads(path.read_text().splitlines()[-1])
    line["ledger"]["holdings"] = [{"device": "abacus", "seconds": 1000.0, "watts": 20.0}]
    path.write_text(json.dumps(line) + "\n")
    shown = statement.text(bill.of_path(folder), None)
    assert re.search("by device time +unknown", shown)
    assert "unknown: no price" in shown
    assert "(estimate: 20 W a device)" in shown
    held = bill.of_path(folder).ledger.device_seconds
    assert held == 128 * 24 * 3600  # what passed after the ledger's state was taken is in the line's own sums


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no run folder"),
        (["--against", "coatnet4-jft300m"], "did you mean 'coatnet4-jft300m-224'"),
        (["--agains", "x"], "--against"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str, folder: Path) -> None:
    with pytest.raises(InputError, match=said):
        cost_command([str(folder), *words] if words[0].startswith("-") else words)


def test_a_run_that_has_not_begun_and_a_foreign_file_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "events" / "clock.jsonl").unlink()
    with pytest.raises(InputError, match="has not begun"):
        cost_command([str(folder)])
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="not a document of `coatnet cost --json`"):
        cost_command([str(tmp_path / "other.json")])
