"""The page of a run with a story: what stands on it, and that it needs nothing else."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.pages import story
from trainer import cli
from trainer.report import gather, sections
from trainer.report.write import report

VOID = {"meta", "img", "br", "input", "hr", "link"}


class Reader(HTMLParser):
    """Whether tags are closed in order, what text there is, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [
            f"{tag} {value}" for name, value in attrs if name in ("src", "href", "action", "data") and value
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story.write(tmp_path_factory.mktemp("runs"))


def test_everything_is_on_the_page(folder: Path) -> None:
    text = " ".join(read(report(folder)).words)
    for words in (
        "finished after 300 steps", "81.23%", "optim.warmup_steps", "8 x NVIDIA H100 80GB HBM3",
        "82.6% of 2.02 h since the first start were productive", "R goes on after a stop or a fault", "the guard spoke",
        "paper: CoAtNet-5, JFT-300M", "3.583e+21", "37.33 USD", "lost and done again", "122,880 images",
        "memory of a rank at its peak", "57 GB", "61 GB", "1.07", "seconds a step", "18 s",
        "2 damaged samples were replaced.", 'picture cannot be decoded: <broken> & "short"',
        "1,280,000 samples in 1,250 shards", "Worst of 12 classes", "is class 4", "a chip", "gpu 0 power usage watts",
    ):  # fmt: skip
        assert words in text, words


def test_the_page_needs_nothing_else(folder: Path) -> None:
    page = report(folder)
    reader = read(page)
    assert reader.fetched
    assert all(what.startswith("img data:image/jpeg;base64,") for what in reader.fetched)
    text = page.read_text()
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in text
    assert "@import" not in text
    assert "url(#" in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text.replace("&#x27;", "'")


def test_what_was_made_again_is_shown_as_it_came_out_last(folder: Path) -> None:
    facts = gather.facts(folder)
    by_step = dict(facts.over_steps("train/loss"))
    assert list(by_step) == list(range(10, 301, 10))
    assert by_step[160] == pytest.approx(0.3 + 6 * 2.718281828 ** (-160 / 60))  # the lost one was three times as high
    hours = facts.over_time("train/loss")
    assert len([value for _, value in hours if value == value]) == 18 + 15
    assert sum(value != value for _, value in hours) == 1  # a gap between the attempts


def test_a_rollback_takes_steps_back(folder: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    shutil.copytree(folder, back)
    with (back / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 210, "time": story.step_time(310, True), "train/loss": 1.0}) + "\n")
    assert gather.facts(folder).step == 300
    assert gather.facts(back).step == 210


def test_marks_are_where_things_happened(folder: Path) -> None:
    marks = sections.happenings(gather.facts(folder))
    assert [(mark.letter, mark.fault) for mark in marks] == [
        ("s", False), ("s", False), ("s", False), ("R", True), ("s", False), ("g", False),
    ]  # fmt: skip
    assert marks[3].x == pytest.approx((story.step_time(150, True) - 5 - story.BEGAN) / 3600)
    assert marks[5].text == "the guard spoke at step 250: spike, continue"


def test_what_the_supervisor_saw_is_on_the_page(folder: Path, tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    shutil.copytree(folder, watched)
    now = story.BEGAN + 400.0
    seen: list[dict[str, object]] = [
        {"event": "preflight", "bad": ["node3"], "said": {"node3": "no GPU"}},
        {"event": "hung", "why": "no step for 60 s", "ranks": [2], "named": "rank 2 on node2 is in loader.next"},
        {"event": "ended", "code": 1, "hung": "", "step": 60, "saved": 50},
        {"event": "ended", "code": 75, "hung": "", "step": 60, "saved": 60},
        {"event": "ended", "code": 0, "hung": "", "step": 300, "saved": 300},
    ]
    lines = [json.dumps({"time": now + number, **event}) for number, event in enumerate(seen)]
    (watched / "events" / "agent.jsonl").write_text("\n".join(lines) + '\n{"time": 3, "ev')
    marks = [mark for mark in sections.happenings(gather.facts(watched)) if mark.letter in "NHC"]
    assert [mark.text for mark in marks] == [
        "nodes were not fit: node3", "the ranks hung: rank 2 on node2 is in loader.next",
        "the ranks ended before they should at step 60: exit code 1",
    ]  # fmt: skip
    assert all(mark.fault for mark in marks)
    assert [event["time"] for event in gather.facts(watched).events] == sorted(
        event["time"] for event in gather.facts(watched).events
    )


def test_what_was_foretold_is_beside_what_the_same_start_measured(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "events" / "rank-00000.jsonl").write_text("".join(
        json.dumps({"time": time, "event": event, **more}) + "\n" for time, event, more in (
            (100.0, "start", {"world": 8, "device": "NVIDIA H100"}), (100.0, "predicted", {"bytes": 9e9}),
            (200.0, "resume", {"world": 4, "device": "NVIDIA H100"}),
            (200.0, "predicted", {"bytes": 12e9, "libraries": 2e9, "step_seconds": 2.0}),
        )
    ))  # fmt: skip
    (again / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "time": time, "memory/peak_bytes": peak}) + "\n"
        for step, time, peak in ((1, 150.0, 99e9), (2, 250.0, 5e9))
    ))  # fmt: skip
    told = str(sections.predicted(gather.facts(again)))
    assert all(words in told for words in ("10 GB", "5 GB", "0.50"))
    assert "99 GB" not in told


def test_a_run_that_has_hardly_begun_has_a_page_too(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "run.json", bare)
    text = " ".join(read(report(bare)).words)
    assert "broke off at step 0" in text
    assert "nothing was recorded" in text


def test_runs_are_compared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = story.write(tmp_path, "other", worse=1.3, lr=1e-3)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(folder), str(other)]) == 0
    text = " ".join(read(tmp_path / "report.html").words)
    for words in (
        "2 runs compared",
        "optim.lr",
        "0.001",
        "62.48%",
        "Held-out top-1 over what it cost",
        "the whole report",
    ):
        assert words in text, words
    differ = text.partition("Settings that differ")[2].partition("Curves")[0]
    assert "optim.warmup_steps" not in differ  # in that they are alike


def test_markdown_and_model_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| held-out top-1, raw weights | 81.23% of 10,000 images |" in shown
    assert "| MFU | 2.0% | 37.0% | 0.05319 |" in shown
    other = story.write(tmp_path, "other", lr=1e-3)
    assert cli.main(["report", str(folder), str(other), "--markdown", "--out", str(tmp_path / "x.md")]) == 0
    table = (tmp_path / "x.md").read_text()
    assert table.splitlines()[0].startswith("| run | status | top-1 | loss |")
    assert len(table.splitlines()) == 4
    capsys.readouterr()
    assert cli.main(["report", str(folder), "--card"]) == 0
    card = capsys.readouterr().out
    assert card == (folder / "model-card.md").read_text()  # what the page's tests have left there
    for words in ("## Training data", "RandAugment 2, 5", "class 0 (0.0% of 800)", "9.557 kWh", "## Limits"):
        assert words in card, words


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "not a run folder"), (["--card", "--markdown"], "a model card is of one run"),
     (["--markdwn"], "did you mean '--markdown'")],
)  # fmt: skip
def test_wrong_words_are_refused(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *([str(folder)] if words[0].startswith("-") else []), *words]) == 76
    assert said in capsys.readouterr().err


def test_a_damaged_folder_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "evaluation.json").write_text('{"step": 3')
    assert cli.main(["report", str(broken)]) == 76
    assert f"{broken}: cannot be read as a run's folder" in capsys.readouterr().err
    assert json.loads((folder / "evaluation.json").read_text())["step"] == 300


def test_charts_stand_alone_as_files(folder: Path) -> None:
    report(folder)
    names = {path.name for path in (folder / "plots").iterdir()}
    assert {"training-loss.svg", "held-out-scores.svg", "learning-rate.svg", "images-a-second.svg"} <= names
    for name in names:
        root = ElementTree.parse(folder / "plots" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert "samples in 1,250 shards" in (folder / "data-card.md").read_text()
