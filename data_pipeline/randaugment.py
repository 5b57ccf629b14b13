"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719): `layers` operations drawn from 14, all at one magnitude.

Magnitudes run from 0 to 30 and map to each operation's range as torchvision's RandAugment with 31 bins does;
geometric operations are bilinear and fill with grey, as in the paper's code.
"""

import math
from collections.abc import Callable
from random import Random

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

MAX_MAGNITUDE = 30.0
FILL = [128.0, 128.0, 128.0]

Operation = Callable[[torch.Tensor, float], torch.Tensor]


def rand_augment(image_CHW: torch.Tensor, layers: int, magnitude: float, draws: Random) -> torch.Tensor:
    """`layers` operations on a uint8 picture (3, H, W), chosen and signed by `draws`; the shape stays.

    Args:
        image_CHW: uint8.
        layers: number of operations, drawn with repetition.
        magnitude: 0 .. 30, the same for all of them.
        draws: the only source of chance.
    """
    for _ in range(layers):
        name = NAMES[draws.randrange(len(NAMES))]
        sign = 1.0 if draws.random() < 0.5 else -1.0
        image_CHW = OPERATIONS[name](image_CHW, sign * magnitude / MAX_MAGNITUDE)
    return image_CHW


def _affine(
    image: torch.Tensor, x: float = 0.0, y: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0
) -> torch.Tensor:
    """Shift by whole pixels, or shear by a slope about the upper left corner."""
    moved: torch.Tensor = F.affine(
        image,
        angle=0.0,
        translate=[int(x), int(y)],
        scale=1.0,
        shear=[math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))],
        interpolation=InterpolationMode.BILINEAR,
        fill=FILL,
        center=[0.0, 0.0] if shear_x or shear_y else None,
    )
    return moved


def _rotate(image: torch.Tensor, level: float) -> torch.Tensor:
    """Rotation about the centre by up to 30 degrees."""
    turned: torch.Tensor = F.rotate(image, angle=30.0 * level, interpolation=InterpolationMode.BILINEAR, fill=FILL)
    return turned


# Each takes a uint8 picture (3, H, W) and a level in [-1, 1]; the sign matters only where there are two directions.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level: image,
    "shear_x": lambda image, level: _affine(image, shear_x=0.3 * level),
    "shear_y": lambda image, level: _affine(image, shear_y=0.3 * level),
    "translate_x": lambda image, level: _affine(image, x=150 / 331 * image.shape[-1] * level),
    "translate_y": lambda image, level: _affine(image, y=150 / 331 * image.shape[-2] * level),
    "rotate": _rotate,
    "brightness": lambda image, level: F.adjust_brightness(image, 1.0 + 0.9 * level),
    "color": lambda image, level: F.adjust_saturation(image, 1.0 + 0.9 * level),
    "contrast": lambda image, level: F.adjust_contrast(image, 1.0 + 0.9 * level),
    "sharpness": lambda image, level: F.adjust_sharpness(image, 1.0 + 0.9 * level),
    "posterize": lambda image, level: F.posterize(image, bits=8 - round(4 * abs(level))),
    "solarize": lambda image, level: F.solarize(image, threshold=255.0 * (1.0 - abs(level))),
    "autocontrast": lambda image, level: F.autocontrast(image),
    "equalize": lambda image, level: F.equalize(image),
}
NAMES = tuple(OPERATIONS)
