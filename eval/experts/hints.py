"""Per image: for each expert a map of where its features mattered, beside what was answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eagle_moe import explain
from eagle_moe.answer import Answerer
from eagle_moe.canvas import load_image
from eagle_moe.scores.score import is_correct
from eval.experts.measure import ALL, LOG_PROB, Measured, conversation, without
from eval.items import Item
from eval.kept import OnProgress


@dataclass(frozen=True)
class Hint:
    """One item to show.

    - `canvas`: (S,S,3) uint8, the square image that the experts look at.
    - `maps`: expert -> (h,w) on its own grid: gradient x input of the right answer's
      log-probability, see `eagle_moe.explain.weigh`.
    """

    item: Measured
    prediction: str
    canvas: np.ndarray
    maps: dict[str, np.ndarray]

    @property
    def right(self) -> bool:
        return is_correct(self.prediction, self.item.answer)

    def loss(self, expert: str) -> float:
        """What the right answer's log-probability loses with `expert` silenced."""
        scores = self.item.scores
        return scores[ALL][LOG_PROB] - scores[without(expert)][LOG_PROB]


def find_hints(
    answerer: Answerer,
    items: Sequence[Item],
    measured: Mapping[str, Measured],
    means: explain.Maps,
    progress: OnProgress | None = None,
) -> list[Hint]:
    """Ask and weigh `items` one by one; `measured` has them by id."""
    hints = []
    for done, item in enumerate(items, start=1):
        assert item.image is not None
        asked = conversation(item, load_image(item.image))
        prepared = explain.prepare(answerer.processor, [asked], [item.answer])
        maps = explain.encode(answerer.model, prepared.canvases)
        found = explain.weigh(answerer.model, prepared, maps, means)
        hints.append(
            Hint(
                item=measured[item.id],
                prediction=answerer([asked])[0].strip(),
                canvas=prepared.canvases[0].permute(1, 2, 0).numpy(),
                maps={name: x[0].cpu().numpy() for name, x in found.items()},
            )
        )
        if progress is not None:
            progress(done, len(items), "images shown")
    return hints
