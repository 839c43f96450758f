"""The search of the Eagle paper (arXiv 2408.15998, Fig. 4), walked again by its own rule.

Names are ours; the paper's X2 is CLIP with ConvNeXt.
"""

from __future__ import annotations

from collections.abc import Sequence

from train.search.pool import Pool
from train.search.rounds import Choice
from train.search.rules import Plain
from train.search.strategies import Greedy, search
from train.search.trial import Cost, Result, Trial

POOL = ("clip", "convnext", "sam", "dinov2", "pix2struct", "eva02")
BASE = POOL[:2]
FIG_4: dict[str, tuple[float, float, float, float]] = {
    "": (681.5, 1155, 3347, 18.1),
    "dinov2": (685.4, 1461, 3660, 15.1),
    "sam": (690.4, 1464, 4658, 8.8),
    "pix2struct": (685.1, 1670, 4373, 6.9),
    "eva02": (690.7, 1460, 4281, 9.1),
    "dinov2 eva02": (688.0, 1765, 4594, 8.3),
    "sam eva02": (689.4, 1768, 5592, 5.9),
    "pix2struct eva02": (694.6, 1974, 5307, 5.0),
    "dinov2 pix2struct eva02": (684.7, 2280, 5620, 4.7),
    "sam pix2struct eva02": (697.1, 2283, 6617, 3.8),
    "sam dinov2 pix2struct eva02": (686.8, 2588, 6930, 3.6),
}
"""What is added to the base -> average of 11 benchmarks, parameters in M, GFLOPs, images/s."""


def published(trials: Sequence[Trial]) -> list[Result]:
    """Trials as the paper ran them."""
    results = []
    for trial in trials:
        score, millions, gflops, speed = FIG_4[" ".join(trial.members[2:])]
        results.append(Result(trial, score, cost=Cost(1e6 * millions, 1e9 * gflops, speed)))
    return results


def paper_choice() -> Choice:
    return search(Pool(POOL, BASE), Greedy(), Plain(), published)
