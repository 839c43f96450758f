"""Fusions. One import line per file registers it."""

from eagle_moe.fusion import channel_concat, sequence_append  # noqa: F401 - register
from eagle_moe.fusion.base import FUSIONS, Fusion, GridOptions, to_grid

__all__ = ["FUSIONS", "Fusion", "GridOptions", "to_grid"]
