"""Every kind of source, with real small files: what is listed, which labels it has, what is refused."""

import csv
import functools
import http.server
import io
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from configs.errors import InputError
from data_pipeline.building import download
from data_pipeline.building.labels import closure, understand, words_of
from data_pipeline.building.plan import Options
from data_pipeline.building.sources import Reading, list_source
from data_pipeline.building.tasks import build
from data_pipeline.manifest import Dataset
from data_pipeline.shard import OpenShards

SMALL = Options(shard_samples=4, heldout=0.3)


def encoded(number: int, form: str = "PNG", side: int = 9) -> bytes:
    """A picture of its own noise."""
    noise = np.random.default_rng(number).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format=form)
    return file.getvalue()


def contents(dataset: Dataset) -> dict[bytes, tuple[str, ...]]:
    """The class names of each picture, by its bytes."""
    read = {}
    for split in dataset.splits.values():
        shards = OpenShards(split.shard_paths, split.counts)
        for shard, count in enumerate(split.counts.tolist()):
            for number in range(count):
                sample = shards.get(shard).read(number, dataset.classes)
                assert sample.picture not in read
                read[sample.picture] = tuple(dataset.vocabulary[label] for label in sample.labels)
        shards.close()
    return read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 pictures in two classes and a folder below one, formats under wrong names, hidden files, a linked folder."""
    for number in range(20):
        place = ("cat", "dog", "dog/puppy")[number % 3]
        path = tmp_path / "source" / place / f"picture {number}.{('jpg', 'PNG', 'jpeg')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, ("PNG", "JPEG", "WEBP")[number % 3]))
    (tmp_path / "source" / "cat" / ".DS_Store").write_text("x")
    os.symlink("..", tmp_path / "source" / "cat" / "again")
    return tmp_path / "source"


def test_a_folder_of_classes(folder: Path, tmp_path: Path) -> None:
    read = contents(build(str(folder), tmp_path / "out", SMALL))
    assert read == {encoded(n, ("PNG", "JPEG", "WEBP")[n % 3]): (("cat", "dog", "dog")[n % 3],) for n in range(20)}


def test_a_folder_whose_path_is_the_label(folder: Path, tmp_path: Path) -> None:
    dataset = build(str(folder), tmp_path / "out", Options(Reading(labels="path"), 4, 0.3))
    assert (dataset.label_kind, dataset.vocabulary) == ("multi", ("cat", "dog", "dog/puppy"))
    assert contents(dataset)[encoded(2, "WEBP")] == ("dog", "dog/puppy")
    assert contents(dataset)[encoded(1, "JPEG")] == ("dog",)


def write_pictures(root: Path, count: int = 12) -> list[str]:
    (root / "files").mkdir(parents=True)
    for number in range(count):
        (root / "files" / f"{number}.png").write_bytes(encoded(number))
    return [f"files/{number}.png" for number in range(count)]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_lists_of_paths(tmp_path: Path, form: str) -> None:
    paths = write_pictures(tmp_path)
    labels = ["red;round" if number % 2 else "red" for number in range(len(paths))]
    path = tmp_path / f"list.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"file": paths, "tags": [label.split(";") for label in labels]}), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"file": f, "tags": t}) + "\n" for f, t in zip(paths, labels, strict=True)))
    else:
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t" if form == "tsv" else ",")
            table.writerows([("file", "tags"), *zip(paths, labels, strict=True)])
    with pytest.raises(InputError, match=r"no column of labels found; say --columns label=NAME; it has file, tags"):
        list_source(str(path), Reading())
    dataset = build(str(path), tmp_path / "out", Options(Reading(columns={"label": "tags"}), 4, 0.3))
    assert (dataset.label_kind, dataset.vocabulary) == ("multi", ("red", "round"))
    read = contents(dataset)
    assert read == {encoded(n): ("red", "round") if n % 2 else ("red",) for n in range(len(paths))}


def test_a_row_for_each_label_makes_one_picture_of_several(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path)
    lines = [f"{path},{label}" for n, path in enumerate(paths) for label in ([0, 2] if n % 2 else [1])]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    dataset = build(str(tmp_path / "list.csv"), tmp_path / "out", SMALL)
    assert dataset.label_kind == "multi"
    assert contents(dataset) == {encoded(n): ("0", "2") if n % 2 else ("1",) for n in range(len(paths))}
    assert (tmp_path / "out" / "CARD.md").read_text().startswith("# Data card of a coatnet data set\n")


def test_vocabulary_and_hierarchy_files(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path)
    words = ["poodle", "0", "animal"]  # a name, an index, a name
    rows = "".join(f"{path},{words[n % 3]}\n" for n, path in enumerate(paths))
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    (tmp_path / "names").write_text("cat\nanimal\npoodle\ndog\n")
    (tmp_path / "parents").write_text("poodle\tdog\ndog\tanimal\ncat\tanimal\n")
    options = replace(SMALL, vocabulary=str(tmp_path / "names"), hierarchy=str(tmp_path / "parents"))
    dataset = build(str(tmp_path / "list.csv"), tmp_path / "out", options)
    assert dataset.vocabulary == ("cat", "animal", "poodle", "dog")
    wanted = [("animal", "poodle", "dog"), ("cat", "animal"), ("animal",)]
    assert contents(dataset) == {encoded(n): wanted[n % 3] for n in range(len(paths))}
    (tmp_path / "names").write_text("cat\nanimal\npoodel\ndog\n")
    with pytest.raises(InputError, match=r"class in the hierarchy 'poodle'; did you mean 'poodel'"):
        build(str(tmp_path / "list.csv"), tmp_path / "other", options)


@pytest.mark.parametrize("listed", [False, True])
def test_hugging_face_parquet(tmp_path: Path, listed: bool) -> None:
    source = tmp_path / "set" / "data"
    source.mkdir(parents=True)
    feature: dict[str, object] = {"names": ["zebra", "ant", "never seen"], "_type": "ClassLabel"}
    features = {"img": {"_type": "Image"}, "label": {"feature": feature} if listed else feature}
    kind = pa.list_(pa.int64()) if listed else pa.int64()
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", kind)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for part in range(2):
        rows = [
            {"img": {"bytes": encoded(n), "path": f"{n}.png"}, "label": [n % 2] if listed else n % 2}
            for n in range(part * 8, part * 8 + 8)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), source / f"train-{part}.parquet", row_group_size=3)
    dataset = build(str(tmp_path / "set"), tmp_path / "out", SMALL)
    assert (dataset.label_kind, dataset.vocabulary) == ("single", ("zebra", "ant", "never seen"))
    assert contents(dataset) == {encoded(n): (("zebra", "ant")[n % 2],) for n in range(16)}
    assert not (tmp_path / "out" / ".coatnet-build").exists()  # the copies of the pictures went with it


@pytest.mark.parametrize(
    ("member", "field"), [("cls", ""), ("json", ""), ("json", "json.meta.kind"), ("txt", ""), ("txt", "txt")]
)
def test_tars_with_labels_in_any_member(tmp_path: Path, member: str, field: str) -> None:
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / "tars" / f"{shard}.tar"), encoder=False) as writer:
            for number in range(shard * 8, shard * 8 + 8):
                label: object = {"meta": {"kind": number % 2}} if field.startswith("json") else {"label": number % 2}
                data = json.dumps(label) if member == "json" else str(number % 2)
                writer.write({"__key__": f"a/{number}", "png": encoded(number), member: data.encode(), "x": b"?"})
    reading = Reading(label_field=field)
    if not field:  # tars of the same name in two folders
        for shard in range(2):
            (tmp_path / "tars" / str(shard)).mkdir()
            (tmp_path / "tars" / f"{shard}.tar").rename(tmp_path / "tars" / str(shard) / "0.tar")
        assert len(contents(build(f"{tmp_path}/tars/*/0.tar", tmp_path / "apart", Options(reading, 4, 0.3)))) == 16
        for shard in range(2):
            (tmp_path / "tars" / str(shard) / "0.tar").rename(tmp_path / "tars" / f"{shard}.tar")
    assert contents(build(str(tmp_path / "tars"), tmp_path / "out", Options(reading, 4, 0.3))) == {
        encoded(n): (str(n % 2),) for n in range(16)
    }
    if member == "json" and not field:
        with pytest.raises(InputError, match=r"a/0: json has no field 'kind'; see --label-field"):
            build(str(tmp_path / "tars"), tmp_path / "other", Options(Reading(label_field="json.kind"), 4, 0.3))


class Moody(http.server.SimpleHTTPRequestHandler):
    """Serves files; `flaky` ones fail at first, `short` ones always end too early."""

    asked: dict[str, int] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        count = self.asked[self.path] = self.asked.get(self.path, 0) + 1
        if "flaky" in self.path and count < 3:
            self.send_error(503)
        elif "short" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
        else:
            super().do_GET()

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of tmp_path."""
    Moody.asked = {}
    handler = functools.partial(Moody, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_urls_are_fetched_and_what_is_not_there_is_refused_or_counted(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)
    paths = write_pictures(tmp_path)
    for name, number in (("flaky.png", 50), ("copy.png", 0)):
        (tmp_path / "files" / name).write_bytes(encoded(number))
    (tmp_path / "files" / "page.png").write_text("<html>gone</html>")
    bad = ["files/none.png", "files/short.png", "files/page.png"]
    rows = [f"{served}/{path},a" for path in [*paths, "files/flaky.png", "files/copy.png"]]
    (tmp_path / "list.csv").write_text("url,label\n" + "\n".join(rows + [f"{served}/{path},a" for path in bad]))
    with pytest.raises(InputError, match=r"\.png: .* with --skip-unreadable"):
        build(str(tmp_path / "list.csv"), tmp_path / "out", SMALL)
    dataset = build(
        str(tmp_path / "list.csv"), tmp_path / "out", Options(shard_samples=4, heldout=0.3, skip_unreadable=True)
    )
    facts = dataset.card["statistics"]
    assert isinstance(facts, dict)
    assert (facts["listed"], facts["unreadable"], facts["duplicates_left"]) == (17, 3, 1)
    assert sum(split.samples for split in dataset.splits.values()) == 14
    assert Moody.asked["/files/none.png"] <= 2  # once a call: a 404 does not pass
    assert Moody.asked["/files/short.png"] >= download.TRIES
    for split in dataset.splits.values():
        assert set(split.counts[:-1].tolist()) <= {4}  # the next picture took the place of one left out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "path,label\nx.png\n", "not as many cells"),
        ("a.csv", "path,label\nftp://x/y.png,1\n", "a file or at http"),
        ("a.csv", "path,label\n,1\n", "must be a path or a URL"),
        ("a.csv", 'path,label\nx.png,"[1, "\n', "begins like a JSON list"),
        ("a.jsonl", "[1]\n", "must be a JSON object"),
        ("a.jsonl", '{"path": "x", "label": 1.5}\n', "must be a name, a whole number"),
        ("a.jsonl", "{", "cannot be read as jsonl"),
        ("a.jsonl", '{"path": 5, "label": 1}\n', "must be a path or a URL"),
        ("a.parquet", "no parquet", "not readable as Parquet"),
        ("a.zip", "x", "say what they are with --kind"),
    ],
)
def test_lists_of_another_form_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as refusal:
        list_source(str(tmp_path / name), Reading())
    assert said in str(refusal.value)
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        (Reading(kind="folders"), "did you mean 'folder'"),
        (Reading(labels="paths"), "did you mean 'path'"),
        (Reading(columns={"label": "x"}), "--columns belongs to a source of kind list or huggingface"),
        (Reading(label_field="cls"), "--label-field belongs to a source of kind tars"),
    ],
)
def test_wrong_readings_are_refused(folder: Path, reading: Reading, said: str) -> None:
    with pytest.raises(InputError, match=said):
        list_source(str(folder), reading)


def test_no_source_and_a_picture_in_no_class(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder or file, and no file matches"):
        list_source(str(tmp_path / "none-*.tar"), Reading())
    (folder / "stray.png").write_bytes(encoded(1))
    with pytest.raises(InputError, match="lies in no class folder"):
        list_source(str(folder), Reading())


def test_what_labels_mean() -> None:
    assert understand(["3", "1"], [], {}).vocabulary == ("0", "1", "2", "3")
    assert understand(["b", "3"], [], {}).vocabulary == ("3", "b")
    assert understand(["b", "0"], ["a", "b"], {}).indices == {"b": (1,), "0": (0,)}
    assert understand(["1"], ["1", "0"], {}).indices == {"1": (0,)}  # a name before an index
    assert understand(["a"], [], {"a": ["c"]}).vocabulary == ("a", "c")
    assert words_of(" a; b ;a;", "") == ("a", "b")
    assert words_of('["a;b", 2]', "") == ("a;b", "2")
    assert words_of(None, "") == words_of("", "") == ()
    with pytest.raises(InputError, match="'a' is its own ancestor"):
        closure("a", {"a": ["b"], "b": ["a"]})
    with pytest.raises(InputError, match="did you mean 'cat'"):
        understand(["cta"], ["cat", "dog"], {})
    with pytest.raises(InputError, match="label 1000000"):
        understand(["1000000"], [], {})
