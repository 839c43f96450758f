"""The search of the Eagle paper, as decisions of ours: arXiv 2408.15998, Fig. 4 (scores, parameters
in M, GFLOPs, images/s), with its plain rule. Names: the paper's X2 is CLIP with ConvNeXt."""

from __future__ import annotations

from train.search.rounds import Candidate, Choice, Interval, Round
from train.search.trial import Cost, Members

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
ORDER = ("eva02", "pix2struct", "sam", None)
"""What each round added."""


def candidate(members: Members, before: Members | None) -> Candidate:
    score, millions, gflops, speed = FIG_4[" ".join(members[2:])]
    changed = next((name for name in members if before and name not in before), None)
    gain = None
    if before is not None:
        gain = Interval(score - FIG_4[" ".join(before[2:])][0])
    cost = Cost(1e6 * millions, 1e9 * gflops, speed)
    return Candidate(members, changed, Interval(score), gain, None, (0,), cost=cost)


def paper_choice() -> Choice:
    rounds, incumbent = [], BASE
    for number, winner in enumerate(ORDER, start=1):
        others = [name for name in POOL if name not in incumbent]
        tried = [tuple(n for n in POOL if n in {*incumbent, name}) for name in others]
        chosen = tuple(n for n in POOL if n in {*incumbent, winner}) if winner else None
        rounds.append(
            Round(
                number,
                candidate(incumbent, None),
                tuple(candidate(members, incumbent) for members in tried),
                chosen,
                f"{winner} has the highest score." if winner else "Nothing scores higher: stop.",
            )
        )
        incumbent = chosen or incumbent
    return Choice(incumbent, tuple(rounds), "greedy", "plain")
