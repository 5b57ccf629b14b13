"""The README's figures are those of the records."""

from pathlib import Path

from trainer.bench import record as bench


def test_table_is_made_from_the_records(repository: Path) -> None:
    content = (repository / "README.md").read_text()
    shown = content.partition("<!-- records -->\n")[2].partition("\n<!-- /records -->")[0]
    assert shown == bench.table(repository / "tests" / "records")
    assert shown.count("\n") >= 2  # a head and at least one record


def test_insert_replaces_what_stands_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- records -->\nold\n<!-- /records -->\nb\n")
    bench.insert(page, "new")
    assert page.read_text() == "a\n<!-- records -->\nnew\n<!-- /records -->\nb\n"


def test_record_round_trip(tmp_path: Path) -> None:
    facts = {"device": "cpu", "cores": 2, "cpu": "a chip", "commit": "abc"}
    record = bench.Record("thing", "make it", facts, {}, "s", {"a": [2.0, 4.0], "b": [1.0, 1.0]}, {"ratio": "3x"})
    assert bench.read(record.write(tmp_path)) == record
    assert bench.median_ratio(record.samples["a"], record.samples["b"]) == 3.0
    assert "| thing | ratio 3x | cpu, 2 cores of a chip |" in bench.table(tmp_path)


def test_rounds_alternate() -> None:
    order: list[str] = []

    def case(name: str) -> float:
        order.append(name)
        return 1.0

    samples = bench.alternate({name: (lambda name=name: case(name)) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abcbcacab"
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}
