"""Decoding: every colour mode to upright uint8 RGB, and nothing but DataError out of bad bytes."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from data_pipeline.decode import decode
from data_pipeline.errors import Damage, DataError

LIMIT = 10_000
RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=form, **options)
    return file.getvalue()


def colour(pixels: torch.Tensor, y: int, x: int) -> tuple[int, ...]:
    return tuple(pixels[:, y, x].tolist())


def near(found: tuple[int, ...], wanted: tuple[int, ...], off: int = 3) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= off


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_modes(form: str, mode: str) -> None:
    pixels = decode(saved(Image.new("RGB", (20, 10), (200, 100, 50)).convert(mode), form, quality=95), LIMIT)
    assert pixels.shape == (3, 10, 20)
    assert pixels.dtype == torch.uint8
    assert near(colour(pixels, 5, 5), (200, 100, 50) if mode == "RGB" else (124, 124, 124))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize(("mode", "progressive"), [("RGB", False), ("RGB", True), ("L", False)])
def test_without_torchvisions_decoder_the_pixels_are_the_same(
    mode: str, progressive: bool, subsampling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(subsampling).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((91, 67), Image.Resampling.BICUBIC).convert(mode)
    data = saved(picture, "JPEG", quality=85, progressive=progressive, subsampling=subsampling)
    pixels = decode(data, LIMIT)
    monkeypatch.setattr("data_pipeline.decode.TORCHVISION", False)
    assert torch.equal(decode(data, LIMIT), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(mode: str) -> None:
    grey = (80, 80, 80)
    picture = Image.new("RGBA", (8, 8), (*grey, 255))
    picture.putpixel((3, 2), (*grey, 0))
    picture.putpixel((4, 2), (*grey, 128))
    pixels = decode(saved(picture.convert(mode), "PNG"), LIMIT)
    assert colour(pixels, 0, 0) == grey
    assert colour(pixels, 2, 3) == WHITE
    assert near(colour(pixels, 2, 4), (167, 167, 167))


def test_palette_with_and_without_transparency() -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 255, *RED])
    picture.putpixel((3, 2), 0)
    assert colour(decode(saved(picture, "PNG"), LIMIT), 2, 3) == (0, 0, 255)
    clear = decode(saved(picture, "PNG", transparency=0), LIMIT)
    assert colour(clear, 2, 3) == WHITE
    assert colour(clear, 0, 0) == RED


def test_one_colour_made_transparent() -> None:
    picture = Image.new("RGB", (4, 4), RED)
    picture.putpixel((1, 1), (1, 2, 3))
    assert colour(decode(saved(picture, "PNG", transparency=(1, 2, 3)), LIMIT), 1, 1) == WHITE


def test_cmyk_jpeg() -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert near(colour(decode(saved(picture, "JPEG", quality=95), LIMIT), 8, 8), RED, off=6)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    pixels = decode(saved(Image.fromarray(values), "PNG"), LIMIT)
    assert pixels[0].tolist() == [[0, 1, 100, 255]]


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(form: str, orientation: int) -> None:
    stored = Image.new("RGB", (32, 16), WHITE)
    stored.paste(RED, (0, 0, 16, 8))  # the upper left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(saved(stored, form, exif=exif.tobytes()), LIMIT)
    height, width = (16, 32) if orientation < 5 else (32, 16)
    assert pixels.shape == (3, height, width)
    # Where the stored upper left corner is seen, for EXIF orientations 1 .. 8.
    y, x = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)][orientation - 1]
    assert near(colour(pixels, 2 + y * (height - 5), 2 + x * (width - 5)), RED)
    assert near(colour(pixels, 2 + (1 - y) * (height - 5), 2 + x * (width - 5)), WHITE)


def test_broken_exif_does_not_lose_the_picture() -> None:
    data = saved(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert near(colour(decode(data, LIMIT), 8, 8), RED)


def test_embedded_profile_is_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(saved(Image.new("RGB", (9, 9), RED), "PNG", icc_profile=profile), LIMIT).shape == (3, 9, 9)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    data = saved(Image.new("L", (101, 100)), "PNG")
    with pytest.raises(DataError, match=r"101 x 100 pixels: the limit is data.max_pixels = 10000"):
        decode(data, LIMIT)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"P6 1 1 255 abc"])
def test_garbage_is_a_data_error_with_a_reason(data: bytes) -> None:
    with pytest.raises(DataError, match=r"cannot be decoded: .+") as refusal:
        decode(data, LIMIT)
    assert "0x" not in str(refusal.value)  # the same words in every process


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_truncated_file_is_refused(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = saved(noise, form)
    with pytest.raises(DataError):
        decode(data[: len(data) // 2], LIMIT)


@given(
    form=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_damaged_files_give_pixels_or_a_data_error(form: str, cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(saved(Image.linear_gradient("L").resize((24, 24)).convert("RGB"), form))
    for place, change in flips:
        data[place % len(data)] ^= change
    try:
        pixels = decode(bytes(data[: len(data) - cut % len(data)]), LIMIT)
    except DataError:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


def test_a_png_of_huge_size_is_refused_before_decoding() -> None:
    data = bytearray(saved(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(Damage, match="60000 x 60000 pixels"):
        decode(bytes(data), 100_000_000)


def test_a_jpeg_of_huge_size_is_refused_before_decoding() -> None:
    data = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    with pytest.raises(Damage, match="65000 x 65000 pixels"):
        decode(bytes(data), 100_000_000)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0"])
def test_a_jpeg_of_endless_scans_is_refused(exif: bytes) -> None:
    data = saved(Image.new("RGB", (64, 64), RED), "JPEG", progressive=True, exif=exif)
    assert decode(data, LIMIT).shape == (3, 64, 64)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(Damage, match=r"picture of \d+ scans: the limit is 100"):
        decode(data[:-2] + data[last:-2] * 100 + data[-2:], LIMIT)


def test_only_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (9, 9), WHITE), Image.new("RGB", (9, 9), (0, 0, 255))]
    data = saved(Image.new("RGB", (9, 9), RED), "WEBP", save_all=True, append_images=frames, lossless=True)
    assert near(colour(decode(data, LIMIT), 4, 4), RED)


WITHOUT_MEMORY = """
import resource, sys
from pathlib import Path
from data_pipeline.decode import decode
from data_pipeline.errors import DataError
small, big = (Path(name).read_bytes() for name in sys.argv[1:])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, resource.RLIM_INFINITY))
try:
    decode(big, 10**9)
except DataError as error:
    print(type(error).__name__, error)
print(tuple(decode(small, 10**9).shape))
"""


def test_no_memory_is_no_damage(tmp_path: Path, repository: Path) -> None:
    # A process of its own: this one has freed memory to spare.
    (tmp_path / "small.jpg").write_bytes(saved(Image.new("RGB", (90, 90)), "JPEG"))
    (tmp_path / "big.png").write_bytes(saved(Image.new("L", (9_000, 9_000)), "PNG"))
    words = [sys.executable, "-c", WITHOUT_MEMORY, str(tmp_path / "small.jpg"), str(tmp_path / "big.png")]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    assert re.match(r"DataError no memory to decode a picture.*\n\(3, 90, 90\)\n$", done.stdout), done.stdout


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 33)])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 75},
        {"quality": 95, "subsampling": 0},
        {"progressive": True},
        {"restart_marker_blocks": 1},
        {"comment": b"words", "dpi": (300, 300)},
        {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
        {"keep_rgb": True},
        {"exif": b"Exif\0\0"},
        {"xmp": b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_short_way_of_plain_jpegs_leads_to_the_same_pixels(
    mode: str, options: dict[str, object], size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(data)) as picture:
        wanted = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert np.abs(decode(data, LIMIT).permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1
