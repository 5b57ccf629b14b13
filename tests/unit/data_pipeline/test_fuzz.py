"""Any bytes at all in a manifest, an index, a sidecar, a tar or a picture: our own errors come out, and soon."""

import hashlib
import io
import json
import shutil
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from configs.errors import InputError
from data_pipeline.decode import decode
from data_pipeline.errors import Damage
from data_pipeline.manifest import Dataset, fingerprint, open_dataset
from data_pipeline.members import TAR_BLOCK, members, parse
from data_pipeline.shard import OpenShards, pack_sidecar, read_sidecar, sidecar_path

MANY = 20_000  # cases of each kind in the long campaign
SECONDS = 5.0  # no case may take longer; most take a millisecond
PIXELS = 1_000_000

Fuzz = Callable[[Random], None]
Property = Callable[[str, object], None]


def changed(data: bytes, draws: Random) -> bytes:
    """The bytes with a few of them overwritten, cut out, doubled, moved or lost from the end."""
    out = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        place, length = draws.randrange(len(out) + 1), min(int(draws.expovariate(0.05)) + 1, 600)
        kind = draws.randrange(7)
        if kind == 0:
            out[place : place + 1] = bytes([draws.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, draws.randrange(256)))])
        elif kind == 1:
            out[place : place + length] = draws.randbytes(length)
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = out[place : place + length]
        elif kind == 4:
            other = draws.randrange(len(out) + 1)
            out[place : place + length] = out[other : other + length]
        elif kind == 5:
            value = draws.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, draws.getrandbits(64)))
            out[place : place + 8] = struct.pack(draws.choice("<>") + "Q", value)
        else:
            del out[place:]
    return bytes(out)


def pictures() -> list[bytes]:
    """Small pictures of every form that is decoded, and of some that are not."""
    draws = Random(0)
    noise = Image.frombytes("RGB", (40, 30), draws.randbytes(3600))
    ramp, found = Image.linear_gradient("L").resize((33, 47)), []
    exif = Image.Exif()
    exif[0x0112] = 6
    for picture, form, options in (
        (noise, "JPEG", {"quality": 90}),
        (noise, "JPEG", {"progressive": True}),
        (noise, "JPEG", {"exif": exif.tobytes(), "comment": b"words"}),
        (ramp, "JPEG", {"restart_marker_blocks": 2}),
        (ramp.convert("CMYK"), "JPEG", {}),
        (noise, "PNG", {}),
        (ramp.convert("P"), "PNG", {"transparency": 3}),
        (ramp.convert("LA"), "PNG", {}),
        (ramp.convert("I;16"), "PNG", {}),
        (noise, "WEBP", {"lossless": True}),
        (noise, "WEBP", {"save_all": True, "append_images": [noise.rotate(90)], "duration": 5}),
        (noise, "GIF", {}),
        (noise, "TIFF", {}),
    ):
        file = io.BytesIO()
        picture.save(file, format=form, **options)
        found.append(file.getvalue())
    return found


PICTURES = pictures()


def fuzz_picture(draws: Random) -> None:
    try:
        pixels = decode(changed(draws.choice(PICTURES), draws), PIXELS)
    except Damage:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
    assert 0 < pixels[0].numel() <= PIXELS


def samples() -> list[bytes]:
    """The tar members of one sample in several ways to write them."""
    found = []
    for form, key in (
        (tarfile.USTAR_FORMAT, "a/b"),
        (tarfile.GNU_FORMAT, "k" * 120),
        (tarfile.PAX_FORMAT, "\xe4" * 120),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for extension, content in (("jpg", b"picture" * 40), ("json", b'{"labels": [0, 2]}'), ("txt", b"words")):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mtime = len(content), 1.5
                archive.addfile(member, io.BytesIO(content))
            end = archive.offset
        found.append(file.getvalue()[:end])
    return found


SAMPLES = samples()


def with_right_checksums(data: bytes) -> bytes:
    """Every block that may be a header with the checksum of its bytes, so that damage gets past that."""
    out = bytearray(data)
    for begin in range(0, len(out) - TAR_BLOCK + 1, TAR_BLOCK):
        block = out[begin : begin + TAR_BLOCK]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            out[begin + 148 : begin + 156] = b"%06o\0 " % sum(block)
    return bytes(out)


def by_tarfile(data: bytes) -> list[tuple[str, bytes]]:
    """What Python's own reader finds, until a field that is not ours to use makes it stop."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    found.append((member.name, content.read()))
    except tarfile.TarError:
        return found
    return found


def fuzz_sample(draws: Random) -> None:
    data = changed(draws.choice(SAMPLES), draws)
    if draws.random() < 0.8:
        data = with_right_checksums(data)
    try:
        found = [(member.name, data[member.begin : member.end]) for member in members(data)]
    except Damage:
        found = []
    if found:
        for (name, content), (other, other_content) in zip(found, by_tarfile(data), strict=False):
            assert other.startswith(name)  # it takes what follows a long name in its block for a part of it
            assert content == other_content
    try:
        sample = parse(data, 3)
    except Damage:
        return
    assert sample.picture in data
    assert all(0 <= label < 3 for label in sample.labels)


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.root, tmp_path / "copy"))


def fuzz_sidecar(copy: Path, draws: Random) -> None:
    """A sidecar of any bytes, with a right checksum more often than not; what opens reads, or says why not."""
    path = str(copy / "train" / "shard-000001.tar")
    sidecar = Path(sidecar_path(path))
    original = sidecar.read_bytes()
    data = changed(original, draws)
    if draws.random() < 0.7:
        data = (data + original[len(data) :])[: len(original) - 4]
        data += struct.pack("<I", zlib.crc32(data))
    if draws.random() < 0.3:
        edges = sorted(draws.sample(range(0, Path(path).stat().st_size + 5120, TAR_BLOCK), 7))
        data = pack_sidecar(edges, [draws.getrandbits(32) for _ in range(6)])
    sidecar.write_bytes(data)
    try:
        found = read_sidecar(path, 6, whole=draws.random() < 0.5)
        shards = OpenShards([path], found.offsets[:1].astype("int64") * 0 + 6)
        for number in range(6):
            sample = shards.read(0, number, 3)
            assert sample.labels[0] == int(sample.key.rpartition("-")[2]) % 3
    except InputError:
        return
    finally:
        sidecar.write_bytes(original)


def other_json(value: object, draws: Random) -> object:
    """A JSON value in place of another, or the other with one of its parts so changed."""
    if isinstance(value, dict) and value and draws.random() < 0.85:
        key = draws.choice(sorted(value))
        rest = {name: part for name, part in value.items() if name != key}
        return rest if draws.random() < 0.1 else {**rest, key: other_json(value[key], draws)}
    if isinstance(value, list) and value and draws.random() < 0.85:
        at = draws.randrange(len(value))
        return [*value[:at], other_json(value[at], draws), *value[at + 1 :]]
    strange: list[object] = [
        None,
        True,
        -1,
        0,
        1.5,
        2**70,
        float("nan"),
        "",
        "..",
        "/etc",
        "\ud800",
        "a\0b",
        "x" * 3000,
        [],
        {},
    ]
    return draws.choice([*strange, [[]], {"": 0}, "train.parquet", "heldout.parquet"])


def fuzz_manifest(copy: Path, draws: Random) -> None:
    """A manifest of other values, or of any bytes."""
    path = copy / "manifest.json"
    original = path.read_bytes()
    data = json.dumps(other_json(json.loads(original), draws)).encode()
    path.write_bytes(data if draws.random() < 0.7 else changed(original, draws))
    try:
        opened = open_dataset(copy)
        assert opened.split("train").samples == int(opened.split("train").counts.sum())
    except InputError:
        return
    finally:
        path.write_bytes(original)


def fuzz_index(copy: Path, draws: Random) -> None:
    """A Parquet index of any bytes whose checksum the manifest holds."""
    path, manifest = copy / "train.parquet", copy / "manifest.json"
    originals = path.read_bytes(), manifest.read_bytes()
    data, content = changed(originals[0], draws), json.loads(originals[1])
    content["splits"]["train"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    manifest.write_text(json.dumps(content))
    try:
        opened = open_dataset(copy)
        rows = opened.split("train").rows
        assert fingerprint("single", opened.vocabulary, rows) == content["splits"]["train"]["fingerprint"]
    except InputError:
        return
    finally:
        path.write_bytes(originals[0])
        manifest.write_bytes(originals[1])


def repeat(fuzz: Fuzz, cases: int, first: int) -> None:
    """So many cases, each by its own seed, which a failure names."""
    for seed in range(first, first + cases):
        began = time.monotonic()
        try:
            fuzz(Random(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - began < SECONDS, f"seed {seed}"


@pytest.mark.parametrize("fuzz", [fuzz_picture, fuzz_sample])
def test_any_bytes_are_read_or_refused(fuzz: Fuzz) -> None:
    repeat(fuzz, 1500, 0)


@pytest.mark.parametrize("fuzz", [fuzz_sidecar, fuzz_manifest, fuzz_index])
def test_any_bytes_in_a_data_set_are_read_or_refused(fuzz: Callable[[Path, Random], None], copy: Path) -> None:
    repeat(lambda draws: fuzz(copy, draws), 200, 0)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_picture, fuzz_sample])
def test_many_bytes_are_read_or_refused(fuzz: Fuzz, record_property: Property) -> None:
    repeat(fuzz, MANY, 10**6)
    record_property(f"fuzzed: {fuzz.__name__.removeprefix('fuzz_')}", MANY)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_sidecar, fuzz_manifest, fuzz_index])
def test_many_bytes_in_a_data_set_are_read_or_refused(
    fuzz: Callable[[Path, Random], None], copy: Path, record_property: Property
) -> None:
    repeat(lambda draws: fuzz(copy, draws), MANY // 4, 10**6)
    record_property(f"fuzzed: {fuzz.__name__.removeprefix('fuzz_')}", MANY // 4)
