"""Change of resolution: the relative-bias tables are resized, everything else stays (COATNET.md section 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

TABLE = ".attention.table"  # how the name of a relative-bias table ends


def is_table(name: str) -> bool:
    """Whether a parameter of this name is a relative-bias table."""
    return name.endswith(TABLE)


def resize_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """A relative-bias table for another grid, bilinear with half-pixel centres and without antialias.

    Both sides of a table are odd, so that the offset zero stays exactly in its centre. Computed in float64 on the CPU:
    the values do not depend on the device, and rounding moves no centre. The way back does not restore a table.

    Args:
        table: (H, 2h - 1, 2w - 1) of a grid of h x w.
        rows, columns: 2h' - 1 and 2w' - 1 of the new grid.

    Returns:
        (H, rows, columns) in the dtype and on the device of `table`; `table` itself where the sizes are equal.

    Raises:
        ValueError: a side is not odd, so it is no table of offsets.
    """
    sides = (*table.shape[1:], rows, columns)
    if table.dim() != 3 or any(side % 2 == 0 for side in sides):
        raise ValueError(f"a table of {tuple(table.shape)} to {rows} x {columns}: the sides must be odd, 2 grid - 1")
    if table.shape[1:] == (rows, columns):
        return table
    exact_1HRC = table.detach().to("cpu", torch.float64).unsqueeze(0)
    resized = F.interpolate(exact_1HRC, size=(rows, columns), mode="bilinear", align_corners=False, antialias=False)
    return resized.squeeze(0).to(table.device, table.dtype)
