"""What SAM and EVA-02 share: the plain ViT of detection, windowed but for a few global layers.

Layout and padding follow ViTDet (arXiv 2203.16527): a window that sticks out of the map is filled
with zeros after the norm, and those cells take part in attention unmasked.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def to_windows(x: Tensor, size: int) -> Tensor:
    """Map (B,H,W,C) -> windows (B*rows*cols, size, size, C), zero-padded at bottom and right."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    rows, cols = x.shape[1] // size, x.shape[2] // size
    x = x.view(batch, rows, size, cols, size, channels).transpose(2, 3)
    return x.reshape(batch * rows * cols, size, size, channels)


def from_windows(windows: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Inverse of `to_windows`; the padding is cut off."""
    size = windows.shape[1]
    rows, cols = -(-height // size), -(-width // size)
    x = windows.view(batch, rows, cols, size, size, -1).transpose(2, 3)
    return x.reshape(batch, rows * size, cols * size, -1)[:, :height, :width]


class ViTDetBlock(nn.Module):
    """Pre-norm transformer layer on a map (B,H,W,C); `window` 0 attends over the whole map."""

    def __init__(
        self, attn: nn.Module, mlp: nn.Module, width: int, eps: float, window: int
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """`context` goes to the attention as it is (rotary tables, for instance)."""
        batch, height, width, _ = x.shape
        y = self.norm1(x)
        if self.window:
            windows = self.attn(to_windows(y, self.window), *context)
            y = from_windows(windows, batch, height, width)
        else:
            y = self.attn(y, *context)
        x = x + y
        return x + self.mlp(self.norm2(x))
