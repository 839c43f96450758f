"""The page: one HTML file with everything inside, no script, no request; and the matrix as PNG."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eagle_moe.heatmap import in_words, overlays, picture
from eval.experts import words
from eval.experts.figures import (
    Panel,
    draw_matrix,
    draw_poster,
    panel_size,
    panels,
    retrained_panels,
)
from eval.experts.hints import Hint
from eval.experts.matrix import Matrix
from eval.experts.measure import ALL, LOG_PROB
from eval.identity import describe_machine
from eval.page import render, to_svg

PAGE, POSTER = "experts.html", "experts.png"


def write_page(matrix: Matrix, hints: Sequence[Hint], out: Path) -> None:
    """Write both files into `out`."""
    written = {PAGE: render_page(matrix, hints).encode(), POSTER: draw_poster(matrix)}
    for name, content in written.items():
        beside = out / f"{name}.part"
        beside.write_bytes(content)
        os.replace(beside, out / name)


def render_page(matrix: Matrix, hints: Sequence[Hint]) -> str:
    """The HTML text."""
    return render(
        Path(__file__).with_name("page.html.jinja"),
        title=words.TITLE,
        headline=words.headline(matrix),
        setting=_setting(matrix),
        replaced=words.replaced(matrix),
        panels=_panels(panels(matrix)),
        retrained_panels=_panels(retrained_panels(matrix)),
        retrained=words.retrained_rows(matrix),
        agreement=words.agreement(matrix, matrix.skills) if matrix.retrained else "",
        runs=words.runs(matrix) if matrix.retrained else "",
        hints_caption=words.hints_caption(matrix, hints),
        hints=[_hint(hint) for hint in hints],
        terms=words.how_to_read(matrix),
    )


def _setting(matrix: Matrix) -> str:
    identity = matrix.identity
    libraries = ", ".join(
        f"{name} {identity.versions[name]}"
        for name in ("python", "torch", "transformers")
        if name in identity.versions
    )
    return (
        f"{matrix.model}, weights {identity.weights_sha256[:12]}, {identity.dtype} on "
        f"{identity.device}; questions {identity.task.data_sha256[:12]}. {describe_machine()}; "
        f"{libraries}."
    )


def _panels(drawn: Mapping[str, Panel]) -> list[dict[str, str]]:
    made = []
    for title, (metric, rows) in drawn.items():
        draw = partial(draw_matrix, title="", metric=metric, rows=rows)
        text = "; ".join(
            f"{expert}: "
            + ", ".join(_in_words(part, metric, score) for part, score in parts.items())
            for expert, parts in rows.items()
        )
        svg = to_svg(title, draw, panel_size(rows))
        made.append({"title": title, "text": f"{title}. {text}", "svg": svg})
    return made


def _in_words(part: str, metric: str, score: Any) -> str:
    value, interval = words.show(metric, score)
    return f"{part} {value} ({interval})"


def _hint(hint: Hint) -> dict[str, Any]:
    maps = [
        {
            "expert": expert,
            "png": base64.b64encode(png).decode(),
            "text": in_words(expert, hint.maps[expert]),
            "lost": words.lost(hint, expert),
        }
        for expert, png in overlays(hint.canvas, hint.maps).items()
    ]
    return {
        "skill": hint.item.skill,
        "question": hint.item.question,
        "answer": hint.item.answer,
        "prediction": hint.prediction,
        "right": hint.right,
        "log_prob": f"{hint.item.scores[ALL][LOG_PROB]:.2f}".replace("-", "\N{MINUS SIGN}"),
        "png": base64.b64encode(picture(hint.canvas)).decode(),
        "maps": maps,
    }
