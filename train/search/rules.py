"""Rules that decide a round: the highest score, or the cheapest of those that noise cannot part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Plain:
    """The paper's rule: the highest score, and stop when it is not above the incumbent's.

    Every mixture is trained with every seed of the search.
    """

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class NoiseAware:
    """Of the mixtures that luck cannot part from the best, the cheapest.

    - `level`: share of cases in which luck alone would have shown less than what is believed.
    - `first_seeds`: seeds of the search that every mixture is trained with; the others only where
      they can settle a doubt.
    - `resamples`: of the bootstrap.
    """

    level: float = 0.8
    first_seeds: int = 1
    resamples: int = 10_000
    name: ClassVar[str] = "noise_aware"


Rule = Plain | NoiseAware
RULES: dict[str, type[Rule]] = {"plain": Plain, "noise_aware": NoiseAware}
