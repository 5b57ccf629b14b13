"""Encoded pictures to pixels: uint8 RGB tensors (3, H, W), whatever the file's colour mode."""

import io

import numpy as np
import torch
import torchvision.io
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import Damage, DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PICTURE_BYTES = 1 << 28
MAX_SCANS = 100  # of a progressive JPEG; each costs a pass over all its pixels, however few bytes it has
# Tables, restart interval, comment, and APP segments but APP1, whose EXIF or XMP may turn the picture.
_PASSED_OVER = frozenset((0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)))
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

# torchvision announces that its decoders will go. Pillow has the same pixels, in one and a half times the time.
TORCHVISION = hasattr(torchvision.io, "decode_jpeg")

# Pillow's own limit is a process-wide constant; `max_pixels` below is checked in its place, before any decoding.
Image.MAX_IMAGE_PIXELS = None


def decode(data: bytes, max_pixels: int) -> torch.Tensor:
    """Pixels of a JPEG, PNG or WebP file as uint8 RGB, (3, H, W).

    Alpha is composited on white, 16-bit grey scaled to 8 bits, EXIF rotation applied, the first frame taken. Plain
    RGB and grey JPEGs go through torchvision (1.5 times as fast), all others through Pillow.

    Raises:
        Damage: not decodable, with the reason, or above the limit of pixels or bytes.
        DataError: this process has no memory for it.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise Damage(f"picture of {len(data)} bytes: the limit is {MAX_PICTURE_BYTES}")
    try:
        size = _plain_jpeg(data) if TORCHVISION else None
        if size is not None:
            _check_pixels(*size, max_pixels)
            return _through_torchvision(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_pixels(*picture.size, max_pixels)
            if picture.format in ("JPEG", "MPO"):
                _check_scans(data)
                if TORCHVISION and picture.mode in ("RGB", "L") and _orientation(picture) == 1:
                    return _through_torchvision(data)
            return _through_pillow(picture)
    except Damage:
        raise
    except UnidentifiedImageError as error:  # whose own words have an address in memory, another one in each process
        raise Damage("picture cannot be decoded: it is no JPEG, PNG or WebP, or its head is damaged") from error
    except Exception as error:  # decoders of untrusted bytes raise anything: struct.error, KeyError, SyntaxError ...
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise DataError(f"no memory to decode a picture of {len(data)} bytes: {error}") from error
        raise Damage(f"picture cannot be decoded: {type(error).__name__}: {error}") from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture that would fill the memory.

    Raises:
        Damage: empty, or above the limit.
    """
    if not 0 < width * height <= max_pixels:
        raise Damage(f"picture of {width} x {height} pixels: the limit is data.max_pixels = {max_pixels}")


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of so many scans that decoding it would take minutes.

    Raises:
        Damage: it has.
    """
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise Damage(f"picture of {scans} scans: the limit is {MAX_SCANS}")


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG in grey or three colours without APP1; None: Pillow has to look closer.

    Walks the markers as far as the pixels, a tenth of the time in which Pillow opens a file and looks for EXIF.

    Raises:
        Damage: more scans than are decoded.
    """
    place, size = 2, None
    while data[:2] == b"\xff\xd8" and place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xDA:
            return size
        if marker in (0xC0, 0xC1, 0xC2):
            precision, colours = data[place + 4], data[place + 9]
            height, width = (int.from_bytes(data[place + at : place + at + 2]) for at in (5, 7))
            if size is not None or precision != 8 or colours not in (1, 3) or not height:
                return None
            size = width, height
            if marker == 0xC2:
                _check_scans(data)
        elif marker not in _PASSED_OVER:
            return None
        place += 2 + length
    return None


def _through_torchvision(data: bytes) -> torch.Tensor:
    """A JPEG in grey or three colours to uint8 RGB, (3, H, W)."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels_CHW = torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
    assert isinstance(pixels_CHW, torch.Tensor)
    return pixels_CHW


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Unreadable EXIF says nothing about the pixels and counts as none."""
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's EXIF parser raises a different error for each way to be broken
        return 1
    return value if value in range(1, 9) else 1


def _through_pillow(picture: Image.Image) -> torch.Tensor:
    """Any mode to upright uint8 RGB, (3, H, W)."""
    upright = ImageOps.exif_transpose(picture) if _orientation(picture) != 1 else picture
    if upright.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(upright, dtype=np.int64), 0, 65535)
        upright = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if "transparency" in upright.info or upright.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        coloured = upright.convert("RGBA")
        upright = Image.new("RGB", coloured.size, "white")
        upright.paste(coloured, mask=coloured)  # the pixels of Image.alpha_composite, in half its time
    pixels_HWC = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)
