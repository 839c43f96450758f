"""Successive halving inside a round: cheap trials first, full ones for those that do well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Halving:
    """Rising `budgets` (shares of the steps, below 1); after each the best `keep` go on.

    The last survivors are trained in full. Jamieson and Talwalkar 2016 (arXiv 1502.07943).
    """

    budgets: tuple[float, ...] = (0.25,)
    keep: float = 0.5
