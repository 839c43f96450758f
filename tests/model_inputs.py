"""Canvases and prompts for the tiny models of `conftest`."""

from __future__ import annotations

import torch

from tests.conftest import CANVAS

TINY = ("clip-tiny", "convnext-tiny", "pix2struct-tiny", "eva02-tiny", "sam-tiny", "dinov2-tiny")
"""A preset of every kind of ours."""

TOKENS = 16
"""Per image, as `make_config` has it."""


def canvases(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, CANVAS, CANVAS), dtype=torch.uint8, generator=generator)


def prompt(*pieces: int | str) -> torch.Tensor:
    """Token ids (1,L): numbers are text, "image" is a run of placeholders."""
    ids: list[int] = []
    for piece in pieces:
        ids += [3] * TOKENS if piece == "image" else [int(piece)]
    return torch.tensor([ids])
