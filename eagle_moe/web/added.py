"""What each expert added to an answer, as a piece of HTML: figures with bars, and maps."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eagle_moe import explain
from eagle_moe.heatmap import HINTS, PLACES, in_words, overlays, picture, replaced, true_minus

MOST_IMAGES = 4
"""Images of a conversation whose maps are drawn: the last ones."""


@dataclass(frozen=True)
class Added:
    """What each expert added to one answer.

    - `log_prob`: of the answer, its end included. `lost`: expert -> what it loses without it.
    - `canvases`: (S,S,3) uint8 of each image. `maps`: for each image, expert -> (h,w).
    """

    log_prob: float
    lost: dict[str, float]
    canvases: list[np.ndarray]
    maps: list[dict[str, np.ndarray]]


def weigh_answer(
    model: Any, processor: Any, asked: Sequence[dict[str, Any]], answer: str, means: explain.Maps
) -> Added:
    """The conversation `asked`, which ends in a question with `answer`, weighed.

    Raises `ValueError` if it has no image.
    """
    prepared = explain.prepare(processor, [asked], [answer])
    if not len(prepared.canvases):
        raise ValueError("No image was shown in this conversation, so the experts saw nothing.")
    maps = explain.encode(model, prepared.canvases)
    with torch.no_grad():
        log_prob = explain.score(model, prepared, maps).log_prob.item()
        lost = {
            name: log_prob
            - explain.score(model, prepared, explain.silence(maps, means, {name})).log_prob.item()
            for name in maps
        }
    weights = explain.weigh(model, prepared, maps, means)
    return Added(
        log_prob,
        lost,
        [canvas.permute(1, 2, 0).numpy() for canvas in prepared.canvases],
        [
            {name: x[index].cpu().numpy() for name, x in weights.items()}
            for index in range(len(prepared.canvases))
        ],
    )


def render(
    added: Added, question: str, answer: str, names: Sequence[str], reference: int, source: str
) -> str:
    """HTML; `names` of the images, `reference` images of `source` were averaged over."""
    top = max(map(abs, added.lost.values())) or 1.0
    drawn = list(zip(names, added.canvases, added.maps, strict=True))[-MOST_IMAGES:]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    ).get_template("added.html.jinja")
    return template.render(
        question=question,
        answer=answer,
        log_prob=_figure(added.log_prob),
        rows=[
            {
                "expert": name,
                "side": "raised" if lost > 0 else "lowered",
                "width": round(100 * abs(lost) / top),
                "lost": _figure(lost),
            }
            for name, lost in added.lost.items()
        ],
        images=[_image(*one) for one in drawn],
        caption=_caption(reference, source),
    )


def _figure(value: float) -> str:
    return true_minus(f"{value:+.2f}")


def _image(name: str, canvas: np.ndarray, maps: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "name": name,
        "png": _base64(picture(canvas)),
        "maps": [
            {"expert": expert, "png": _base64(png), "text": in_words(expert, maps[expert])}
            for expert, png in overlays(canvas, maps).items()
        ],
    }


def _caption(reference: int, source: str) -> str:
    return (
        "This is the model's own answer, right or wrong. The figures are the claim: how much "
        "log-probability it loses with that expert silenced "
        f"({replaced(reference)}: {source}). {HINTS} {PLACES}"
    )


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
