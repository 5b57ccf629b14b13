"""Between decoding and the network: crops, flip, RandAugment on uint8; normalisation, mixup and cutmix on the device.

Everything random is drawn from Python's `random.Random` seeded by the sample's seed, so that pixels depend on (seed,
epoch, position) alone. Shape suffixes as in `data_pipeline.batch`.
"""

import functools
import math
from collections.abc import Sequence
from random import Random
from typing import Literal

import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from configs.errors import InputError
from configs.schema import Augment
from data_pipeline.batch import Batch
from data_pipeline.randaugment import rand_augment

CROP_TRIES = 10
MIX = 0x6D69  # sets the draws of a mixture apart from those of the same sample's crop


def train_view(image_CHW: torch.Tensor, size: int, augment: Augment, seed: int) -> torch.Tensor:
    """A random view of a uint8 picture (3, H, W) as uint8 (3, size, size), drawn from `seed` alone."""
    draws = Random(seed)
    if augment.crop == "random":
        top, left, height, width = _random_box(image_CHW.shape[-2], image_CHW.shape[-1], augment, draws)
        image_CHW = image_CHW[:, top : top + height, left : left + width]
    view = _resize(image_CHW, size)
    if augment.flip and draws.random() < 0.5:
        view = view.flip(-1)
    if augment.randaugment_layers:
        view = view.contiguous()  # colour by colour, which most of its operations prefer
    return rand_augment(view, augment.randaugment_layers, augment.randaugment_magnitude, draws)


def eval_view(image_CHW: torch.Tensor, size: int, augment: Augment) -> torch.Tensor:
    """The view that evaluation scores, uint8 (3, size, size).

    The central square of the picture, resized so that its inner `size` pixels are `augment.eval_crop` of the short
    side; for `crop="resize"` the whole picture, whatever its shape.
    """
    if augment.crop == "resize":
        return _resize(image_CHW, size)
    # Cutting the square first equals resizing first, and keeps a very long picture from growing beyond memory.
    short = min(image_CHW.shape[-2:])
    square = F.center_crop(image_CHW, [short, short])
    view: torch.Tensor = F.center_crop(_resize(square, max(size, round(size / augment.eval_crop))), [size, size])
    return view


def check_mixing(augment: Augment, slices: Sequence[tuple[int, int]]) -> None:
    """Refuse micro-batches that would part the pairs (0, 1), (2, 3) ... of the global batch while mixing is on.

    Raises:
        InputError: naming the slice.
    """
    odd = [(start, stop) for start, stop in slices if start % 2 or stop % 2]
    if odd and (augment.mixup_alpha or augment.cutmix_alpha):
        start, stop = odd[0]
        raise InputError(
            f"parallel.micro_batch = {stop - start}: mixup and cutmix pair neighbours of the global batch, so every "
            f"micro-batch must be even (positions {start}..{stop} part a pair); nearest valid: {stop - start + 1}"
        )


def draw_mixing(seeds: Sequence[int], size: int, augment: Augment) -> tuple[torch.Tensor, torch.Tensor] | None:
    """How samples 2k and 2k + 1 are mixed: (kept_B float32, boxes_B4 int64) of `Batch`, or None with mixing off.

    Both of a pair share one draw, seeded by its even member: Beta(alpha, alpha), by mixup or, where both are on,
    with probability 1/2 by cutmix (Yun et al. 2019), whose box covers exactly 1 - kept of the picture.
    """
    if not (augment.mixup_alpha or augment.cutmix_alpha):
        return None
    kept, boxes = [], []
    for seed in seeds[::2]:
        draws = Random(seed ^ MIX)
        box = (0, 0, 0, 0)
        if augment.cutmix_alpha and (not augment.mixup_alpha or draws.random() < 0.5):
            box = _cutmix_box(size, draws.betavariate(augment.cutmix_alpha, augment.cutmix_alpha), draws)
            share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / size**2
        else:
            share = draws.betavariate(augment.mixup_alpha, augment.mixup_alpha)
        kept += [share, share]
        boxes += [box, box]
    return torch.tensor(kept, dtype=torch.float32), torch.tensor(boxes, dtype=torch.int64)


def prepare(batch: Batch, augment: Augment, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """The network's input, (B, 3, H, W) of `dtype`: normalised and mixed in float32 on the batch's device."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_BCHW = batch.images_BCHW.to(torch.float32, memory_format=layout)  # a copy, so that the rest may be in place
    # Whole rows at a time where the colours lie side by side: three values are too few for a vector.
    count, colours, height, width = x_BCHW.shape
    rows = x_BCHW.permute(0, 2, 3, 1).view(count, height, width * colours) if channels_last else x_BCHW
    mean, std = _colour_statistics(augment.mean, augment.std, x_BCHW.device, width if channels_last else 0)
    rows.sub_(mean).div_(std)
    if batch.kept_B is not None and batch.boxes_B4 is not None:
        share_B1HW = _own_share(batch.kept_B, batch.boxes_B4, x_BCHW.shape[-2], x_BCHW.shape[-1])
        x_BCHW = x_BCHW * share_B1HW + _swap_pairs(x_BCHW) * (1 - share_B1HW)
    return x_BCHW.to(dtype, memory_format=layout)


@functools.cache
def _colour_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation on the scale of uint8, made once per device: a copy to a GPU waits.

    (3, 1, 1), or with a `width` (3 width,) for a row of pixels whose colours lie side by side.
    """
    found = [torch.tensor(values, device=device).mul(255.0) for values in (mean, std)]
    mean_C, std_C = (values.repeat(width) if width else values.view(3, 1, 1) for values in found)
    return mean_C, std_C


def targets(batch: Batch, classes: int, smoothing: float, loss: Literal["softmax", "sigmoid"]) -> torch.Tensor:
    """What the loss compares with, float32 (B, classes), mixed as the pictures are.

    softmax: a sample's labels share a mass of 1, smoothed to (1 - smoothing) * y + smoothing / classes, so that rows
    sum to 1 (a sample without labels gives the uniform row only when smoothed). sigmoid: every class is a decision of
    its own between two outcomes, smoothed to (1 - smoothing) * y + smoothing / 2. The paper gives "1e-4" without a
    formula; divided by its 18,000 classes it would vanish, so the two-outcome reading is taken.

    Soft labels put their weights in place of the ones; a mass above 1 is scaled down to it for softmax.
    """
    labels_BL = batch.labels if batch.labels.dim() == 2 else batch.labels[:, None]
    # Column 0 collects the padding (-1) and is cut off: no branch on the data, no wait for the device.
    wide = torch.zeros(len(labels_BL), classes + 1, device=labels_BL.device)
    if batch.weights_BL is None:
        y_BK = wide.scatter_(1, labels_BL + 1, 1.0)[:, 1:]
    else:
        y_BK = wide.scatter_(1, labels_BL + 1, batch.weights_BL)[:, 1:]
    if loss == "softmax":
        y_BK = y_BK / y_BK.sum(1, keepdim=True).clamp(min=1.0)
    y_BK = (1 - smoothing) * y_BK + smoothing / (classes if loss == "softmax" else 2)
    if batch.kept_B is not None:
        kept_B1 = batch.kept_B[:, None]
        y_BK = y_BK * kept_B1 + _swap_pairs(y_BK) * (1 - kept_B1)
    return y_BK


def _random_box(height: int, width: int, augment: Augment, draws: Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random-resized crop (Szegedy et al. 2014): area and aspect ratio at random.

    A box that does not fit is drawn again, ten times at most; then the largest centred box within the ratios is taken.
    """
    low, high = augment.crop_ratio
    for _ in range(CROP_TRIES):
        area = height * width * draws.uniform(*augment.crop_scale)
        ratio = math.exp(draws.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.randint(0, height - h), draws.randint(0, width - w), h, w
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


def _cutmix_box(size: int, kept: float, draws: Random) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a box with about 1 - `kept` of the area, its centre anywhere, cut at the edges."""
    side = round(size * math.sqrt(1 - kept))
    y, x = draws.randrange(size), draws.randrange(size)
    top, left = max(0, y - side // 2), max(0, x - side // 2)
    return top, left, min(size, y - side // 2 + side), min(size, x - side // 2 + side)


def _resize(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    """Bicubic with antialias to (size, size).

    Colours side by side in memory, as decoders leave them, and without gaps: the resize is then a third faster.
    """
    if tuple(image_CHW.shape[-2:]) == (size, size):
        return image_CHW
    image_1CHW = image_CHW[None].contiguous(memory_format=torch.channels_last)
    return interpolate(image_1CHW, (size, size), mode="bicubic", antialias=True)[0]


def _own_share(kept_B: torch.Tensor, boxes_B4: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Share of its own sample in each pixel, (B, 1, H, W): `kept_B` everywhere, or with a box 0 inside, 1 outside."""
    top, left, bottom, right = (edge[:, None, None] for edge in boxes_B4.unbind(1))
    y_H1 = torch.arange(height, device=boxes_B4.device)[:, None]
    x_1W = torch.arange(width, device=boxes_B4.device)[None]
    inside_BHW = (y_H1 >= top) & (y_H1 < bottom) & (x_1W >= left) & (x_1W < right)
    boxed_B11 = (bottom > top) & (right > left)
    return torch.where(boxed_B11, (~inside_BHW).float(), kept_B[:, None, None])[:, None]


def _swap_pairs(x: torch.Tensor) -> torch.Tensor:
    """Rows 0 and 1, 2 and 3 ... exchanged."""
    return x.reshape(-1, 2, *x.shape[1:]).flip(1).reshape(x.shape)
