"""Tar members: what others write is read as they read it, what is not understood is refused."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import Damage
from data_pipeline.members import MAX_MEMBERS, MAX_NAME_BYTES, members, parse

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
Files = list[tuple[str, bytes]]


def tar(files: Files, form: int = tarfile.GNU_FORMAT, mtime: float = 0, **fields: object) -> bytes:
    """An archive with its end; `fields` are set in every member's header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), mtime
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read(data: bytes) -> Files:
    return [(member.name, data[member.begin : member.end]) for member in members(data)]


def with_checksum(block: bytearray) -> bytes:
    """A header with its checksum set right."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40)
paths = st.lists(names.filter(lambda name: name.strip(".") != ""), min_size=1, max_size=6).map("/".join)


@given(
    files=st.lists(st.tuples(paths, st.binary(max_size=1500)), max_size=5),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.floats(0, 2**33),
)
@settings(max_examples=150, deadline=None)
def test_archives_are_read_as_pythons_tarfile_reads_them(files: Files, form: int, mtime: float) -> None:
    assert read(tar(files, form, mtime)) == files


@pytest.mark.parametrize("length", [99, 100, 101, 156, 200, 255, 256])
@pytest.mark.parametrize("form", FORMATS)
def test_long_names(length: int, form: int) -> None:
    name = ("folder/" * 40)[: length - 7] + "k" * 3 + ".jpg"
    name = name.replace("//", "/")
    try:
        data = tar([(name, b"x")], form)
    except ValueError:
        assert form == tarfile.USTAR_FORMAT  # has no room for it
        return
    assert read(data) == [(name, b"x")]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("form", ["gnu", "ustar", "posix", "v7"])
def test_archives_of_the_tar_program(tmp_path: Path, form: str) -> None:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    files = {"set/a.jpg": b"picture", "set/a.cls": b"1", f"set/inner/{'k' * 80}.png": bytes(1000)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = ["tar", "-c", f"--format={form}", "-f", "out.tar", "set"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert dict(read((tmp_path / "out.tar").read_bytes())) == files  # and the folders are passed over


@pytest.mark.parametrize("mtime", [None, 0, 1700000000.25])
def test_samples_of_webdatasets_writer(mtime: float | None) -> None:
    file = io.BytesIO()
    writer = webdataset.TarWriter(file, encoder=False, mtime=mtime)
    writer.write({"__key__": "n01/a", "jpg": b"picture", "cls": b"2", "txt": b"a cat", "seg.png": b"mask"})
    end = writer.tarstream.offset
    writer.close()
    sample = parse(file.getvalue()[:end], 3)
    assert (sample.key, sample.extension, sample.picture, sample.labels) == ("n01/a", "jpg", b"picture", (2,))


def test_other_members_are_ignored_and_never_executed() -> None:
    notes = [
        ("a.jpg", b"x"),
        ("a.cls", b"0"),
        ("a.pkl", b"cos\nsystem\n(S'false'\ntR."),
        ("a.pth", b"PK"),
        ("a.txt", b""),
    ]
    assert parse(tar([*notes, ("a.json", b'{"caption": "a cat", "width": 5}')]), 1).labels == (0,)


@pytest.mark.parametrize(
    ("json", "labels", "weights"),
    [
        (b'{"labels": [2, 0]}', (2, 0), ()),
        (b'{"labels": [2, 0], "weights": [0.25, 1]}', (2, 0), (0.25, 1.0)),
        (b'{"labels": [], "weights": []}', (), ()),
    ],
)
def test_soft_labels(json: bytes, labels: tuple[int, ...], weights: tuple[float, ...]) -> None:
    sample = parse(tar([("a.jpg", b"x"), ("a.json", json)]), 3)
    assert (sample.labels, sample.weights) == (labels, weights)


@pytest.mark.parametrize(
    ("json", "said"),
    [
        (b'{"labels": [0], "weights": [1.5]}', "from 0 to 1"),
        (b'{"labels": [0], "weights": [-0.1]}', "from 0 to 1"),
        (b'{"labels": [0], "weights": [NaN]}', "from 0 to 1"),
        (b'{"labels": [0], "weights": [true]}', "from 0 to 1"),
        (b'{"labels": [0], "weights": 1}', "from 0 to 1"),
        (b'{"labels": [0], "weights": [0.5, 0.5]}', "as many as the labels"),
        (b'{"labels": [0, 0], "weights": [0.5, 0.5]}', "distinct"),
        (b'{"labels": [' + b"9" * 5000 + b"]}", "cannot be read"),
    ],
)
def test_wrong_soft_labels_are_refused(json: bytes, said: str) -> None:
    with pytest.raises(Damage, match=said) as refusal:
        parse(tar([("a.jpg", b"x"), ("a.json", json)]), 3)
    assert refusal.value.key == "a"
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "needs one member of"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "needs one member of"),
        ([("a.jpg", b"x"), ("a.JPG", b"x"), ("a.cls", b"0")], "comes twice"),
        ([("a.jpg", b"x"), ("b.cls", b"0")], "also holds a member of 'b'"),
        ([("x/a.jpg", b"x"), ("y/a.cls", b"0")], "also holds a member of 'y/a'"),
        ([("a.jpg", b"x")], "either a cls or a json"),
    ],
)
def test_what_is_no_single_sample_is_refused(files: Files, said: str) -> None:
    with pytest.raises(Damage, match=said):
        parse(tar(files), 3)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"S"],
)
def test_links_devices_and_sparse_files_are_refused(kind: bytes) -> None:
    with pytest.raises(Damage, match=r"'a\.jpg' is no plain file"):
        read(tar([("a.jpg", b"")], type=kind, linkname="/etc/passwd"))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (slice(124, 136), b"\x80" + bytes(10) + b"\x05", "has the number"),  # base 256
        (slice(124, 136), b"-0000000001\0", "has the number"),
        (slice(124, 136), b"00000000009\0", "has the number"),
        (slice(124, 136), bytes(12), "has the number"),
        (slice(124, 136), b"77777777777\0", "ends outside of its sample"),
        (slice(124, 136), b"00000001001\0", "ends outside of its sample"),
        (slice(257, 265), b"ustar\x0099", "of another form"),
        (slice(0, 4), b"\xff\xfe\xfd\0", "not UTF-8"),
        (slice(0, 100), bytes(100), "no plain file"),
        (slice(0, 6), b"name/\0", "no plain file"),
    ],
)
def test_wrong_headers_are_refused(field: slice, value: bytes, said: str) -> None:
    block = bytearray(tar([("a.jpg", b"x" * 10)], tarfile.USTAR_FORMAT)[:512])
    block[field] = value
    with pytest.raises(Damage, match=said):
        read(with_checksum(block) + bytes(512))


@pytest.mark.parametrize(
    "records",
    [
        b"11 path=b\n",
        b"path=b.jpg\n",
        b"0 path=b.jpg\n",
        b"999999 path=b\n",
        b"13 size=-100\n",
        b"9 size=1x\n",
        b"10 path=\0b\n",
        b"22 GNU.sparse.major=1\n",
        b"%d size=%s\n" % (6000, b"9" * 5988),
        b"\xff",
    ],
)
def test_wrong_pax_records_are_refused(records: bytes) -> None:
    plain = tar([("a.jpg", b"x")], tarfile.USTAR_FORMAT)[:1024]
    block = bytearray(plain[:512])
    block[124:136], block[156:157] = b"%011o\0" % len(records), b"x"
    padding = bytes(-len(records) % 512)
    with pytest.raises(Damage):
        read(with_checksum(block) + records + padding + plain)


def test_extensions_that_never_end_are_refused() -> None:
    plain = tar([("a.jpg", b"x")], tarfile.USTAR_FORMAT)[:1024]
    long = tar([("k" * 200, b"")], tarfile.GNU_FORMAT)[:1024]
    for wrong, said in (
        (long, "without its member"),
        (long * 2 + plain, "comes twice"),
        (long[:512] + plain, "has the number"),
        (tar([("k" * (MAX_NAME_BYTES + 1), b"")]), "the name of"),
        (
            tar([(f"folder-{n}", b"") for n in range(2 * MAX_MEMBERS + 1)], type=tarfile.DIRTYPE),
            "more than 1000 members",
        ),
        (plain + bytes(512) + plain, "bytes after the end"),
        (plain[:700], "ends outside"),
        (plain + plain[:100], "cut off"),
    ):
        with pytest.raises(Damage, match=said):
            read(wrong)


def test_nothing_but_an_end_is_no_sample() -> None:
    assert read(bytes(1024)) == []
    with pytest.raises(Damage, match="key None: needs one member"):
        parse(b"", 3)
