"""Tables at another resolution: an independent bilinear, the centre, exactness at equal sizes."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.resize import resize_table


def bilinear(table: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """One sample point after the other, half-pixel centres, edges repeated."""
    heads, height, width = table.shape
    result = np.zeros((heads, rows, columns))
    for row in range(rows):
        for column in range(columns):
            y, x = (row + 0.5) * height / rows - 0.5, (column + 0.5) * width / columns - 0.5
            top, left = int(np.floor(y)), int(np.floor(x))
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                share = (1 - abs(y - i)) * (1 - abs(x - j))
                result[:, row, column] += share * table[:, min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
    return result


# Sides of S3 and S4 at 224, 384 and 512 px, up and down, and grids that are not square.
SIZES = [
    ((27, 27), (47, 47)), ((27, 27), (63, 63)), ((47, 47), (63, 63)), ((63, 63), (27, 27)),
    ((13, 13), (23, 23)), ((13, 13), (31, 31)), ((23, 23), (31, 31)), ((31, 31), (13, 13)),
    ((13, 27), (23, 27)), ((7, 13), (13, 5)), ((1, 1), (3, 3)), ((3, 5), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_agrees_with_an_independent_bilinear(before: tuple[int, int], after: tuple[int, int]) -> None:
    table = np.random.default_rng(0).normal(size=(3, *before))
    resized = resize_table(torch.from_numpy(table), *after)
    assert np.abs(resized.numpy() - bilinear(table, *after)).max() < 1e-12
    rounded = resize_table(torch.from_numpy(table).float(), *after)
    assert rounded.dtype == torch.float32
    assert np.abs(rounded.numpy() - bilinear(table, *after)).max() < 1e-6


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_offset_zero_stays_in_the_centre_to_the_bit(before: tuple[int, int], after: tuple[int, int]) -> None:
    table = torch.randn(5, *before, generator=torch.Generator().manual_seed(0))
    resized = resize_table(table, *after)
    assert torch.equal(resized[:, after[0] // 2, after[1] // 2], table[:, before[0] // 2, before[1] // 2])


def test_equal_sizes_are_the_same_tensor() -> None:
    table = torch.randn(2, 7, 9)
    assert resize_table(table, 7, 9) is table


def test_a_side_that_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 9\).*odd"):
        resize_table(torch.zeros(2, 8, 9), 7, 9)
    with pytest.raises(ValueError, match="odd"):
        resize_table(torch.zeros(2, 7, 9), 7, 10)
