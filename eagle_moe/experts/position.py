"""Absolute position tables at another resolution than they were trained at."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, grid: int, antialias: bool) -> Tensor:
    """Square table (n*n, C), row-major -> (grid*grid, C): bicubic in fp32, in the table's dtype.

    Nothing is done at equal size. Whether a model resamples with antialiasing is part of it.
    """
    native = round(table.shape[0] ** 0.5)
    if native == grid:
        return table
    square = table.float().T.reshape(1, -1, native, native)
    resized = F.interpolate(square, (grid, grid), mode="bicubic", antialias=antialias)
    return resized.flatten(2)[0].T.to(table.dtype)
