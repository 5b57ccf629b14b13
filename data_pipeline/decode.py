"""Encoded pictures to pixels: uint8 RGB tensors (3, H, W), whatever the file's colour mode."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from data_pipeline.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PICTURE_BYTES = 1 << 28
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

# Pillow's own limit is a process-wide constant; `max_pixels` below is checked in its place, before any decoding.
Image.MAX_IMAGE_PIXELS = None


def decode(data: bytes, max_pixels: int) -> torch.Tensor:
    """Pixels of a JPEG, PNG or WebP file as uint8 RGB, (3, H, W).

    Alpha is composited on white, 16-bit grey scaled to 8 bits, EXIF rotation applied, the first frame taken. Plain
    RGB and grey JPEGs go through torchvision (1.5 times as fast), all others through Pillow.

    Raises:
        DataError: not decodable, with the reason, or above the limit of pixels or bytes.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise DataError(f"picture of {len(data)} bytes: the limit is {MAX_PICTURE_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if not 0 < width * height <= max_pixels:
                raise DataError(f"picture of {width} x {height} pixels: the limit is data.max_pixels = {max_pixels}")
            plain_jpeg = picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L")
            if plain_jpeg and _orientation(picture) == 1:
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                pixels_CHW = decode_jpeg(encoded, mode=ImageReadMode.RGB)
                assert isinstance(pixels_CHW, torch.Tensor)
                return pixels_CHW
            return _through_pillow(picture)
    except DataError:
        raise
    except Exception as error:  # decoders of untrusted bytes raise anything: struct.error, KeyError, SyntaxError ...
        raise DataError(f"picture cannot be decoded: {type(error).__name__}: {error}") from error


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
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
