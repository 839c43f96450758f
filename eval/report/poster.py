"""The demo's page as one PNG, drawn with matplotlib: no browser is needed to make or to see it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_moe.scores.score import TOTAL
from eval.page import FAINT, INK, house_style
from eval.report import figures, story
from eval.report.page import SHOWN, curves_of
from eval.report.results import MODELS, DemoResults, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

WIDTH = 13.0
"""Inches; 1,430 pixels at `DPI`."""
DPI = 110
COLUMNS = 3
TEXT_WIDTH = 150
"""Characters of body text in a line."""
LINE = 0.2
"""Inches from one line of body text to the next."""
RIGHT, WRONG = "#1c7c43", "#b3261e"


@dataclass
class Section:
    """A band across the poster: `height` in inches, and what draws it."""

    height: float
    draw: Callable[[SubFigure], None]


def draw_poster(results: DemoResults, path: Path) -> None:
    """Write the PNG."""
    from matplotlib.figure import Figure

    sections = _sections(results)
    heights = [section.height for section in sections]
    with house_style():
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, facecolor="white")
        bands = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)
        for section, band in zip(sections, bands[:, 0], strict=True):
            section.draw(band)
        figure.savefig(path, format="png", metadata={"Software": None})


def _sections(results: DemoResults) -> list[Section]:
    sections = [
        Section(0.85, partial(_draw_text, lines=[story.TITLE], top=0.3, size=22, weight="bold")),
        _text(story.headline(results), size=12, width=130),
        Section(1.45, partial(_draw_tiles, results=results)),
        _text(*story.lead_sentences(results.lead)),
        _text(story.setting(results), colour=FAINT),
        _heading("Accuracy per skill, with 95 % intervals"),
        _panels([partial(_draw_accuracy, results=results, skill=skill) for skill in _all(results)]),
        _heading("What the models answer"),
        *_sample_rows(results),
    ]
    curves = [skill for skill in _all(results) if curves_of(results, skill)]
    if curves:
        sections += [
            _heading("Learning curves: exact match on held-out questions"),
            Section(0.35, partial(_draw_legend, results=results)),
            _panels([partial(_draw_curves, results=results, skill=skill) for skill in curves]),
        ]
    if results.probe is not None:
        rows = len(results.probe.rows)
        draw = partial(figures.draw_probe, probe=results.probe)
        sections += [
            _heading("What each expert sees: accuracy of a linear probe on its features"),
            Section(0.4 + 0.32 * rows, partial(_draw_wide, draw=draw, top=0.3)),
        ]
    draw = partial(figures.draw_seconds, seconds=results.seconds)
    sections += [
        _heading("Where the time went"),
        _text(story.time_sentence(results), colour=FAINT),
        Section(0.1 + 0.26 * len(results.seconds), partial(_draw_wide, draw=draw)),
        _heading("How this was measured"),
        _text(*(f"{term}: {said}" for term, said in story.how_measured(results))),
    ]
    if results.ask:
        sections += [_heading("Ask it yourself"), _text(results.ask, family="monospace")]
    sections += [_heading("Caveats"), _text(*story.caveats(results))]
    return sections


def _all(results: DemoResults) -> list[str]:
    return [TOTAL, *results.skills]


def _heading(text: str) -> Section:
    return Section(0.72, partial(_draw_text, lines=[text], top=0.36, size=14, weight="bold"))


def _text(*paragraphs: str, size: float = 10.5, width: int = TEXT_WIDTH, **style: Any) -> Section:
    lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, width)]
    height = LINE * size / 10.5 * len(lines) + 0.25
    return Section(height, partial(_draw_text, lines=lines, size=size, **style))


def _draw_text(
    band: SubFigure,
    lines: list[str],
    size: float,
    top: float = 0.05,
    colour: str = INK,
    **style: Any,
) -> None:
    """Lines from `top` inches below the band's upper edge."""
    height = band.bbox.height / band.dpi
    text = "\n".join(lines)
    style |= {"fontsize": size, "color": colour, "linespacing": 1.35, "parse_math": False}
    band.text(0.03, 1 - top / height, text, va="top", **style)


def _draw_tiles(band: SubFigure, results: DemoResults) -> None:
    width = 0.94 / len(results.models)
    for index, name in enumerate(results.models):
        score = results.accuracy[name][TOTAL]
        left = 0.03 + index * width
        band.add_artist(_bar(left, 0.9, 0.85 * width, figures.COLOURS[name]))
        band.text(left, 0.54, f"{100 * score.mean:.0f} %", fontsize=24, weight="bold")
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
        band.text(left, 0.36, MODELS[name], fontsize=10)
        band.text(left, 0.2, interval, fontsize=9, color=FAINT)


def _bar(left: float, bottom: float, width: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), width, 0.05, color=colour)


def _panels(draws: list[Callable[[Axes], None]]) -> Section:
    rows = math.ceil(len(draws) / COLUMNS)

    def draw(band: SubFigure) -> None:
        grid = band.subplots(rows, COLUMNS, squeeze=False)
        band.subplots_adjust(left=0.12, right=0.985, top=1 - 0.3 / (2.2 * rows), wspace=0.42)
        band.subplots_adjust(bottom=0.45 / (2.2 * rows), hspace=0.55)
        for index, axes in enumerate(grid.flat):
            if index < len(draws):
                draws[index](axes)
            else:
                axes.set_axis_off()

    return Section(2.2 * rows, draw)


def _draw_accuracy(axes: Axes, results: DemoResults, skill: str) -> None:
    scores = {name: results.accuracy[name][skill] for name in results.models}
    figures.draw_accuracy(axes, skill, scores)


def _draw_curves(axes: Axes, results: DemoResults, skill: str) -> None:
    chance = results.accuracy["chance"][skill].mean
    figures.draw_curves(axes, skill, curves_of(results, skill), chance)


def _draw_legend(band: SubFigure, results: DemoResults) -> None:
    left = 0.03
    for name in [*results.curves, "chance"]:
        band.add_artist(_bar(left, 0.42, 0.018, figures.COLOURS[name]))
        band.text(left + 0.024, 0.35, MODELS[name], fontsize=10)
        left += 0.06 + 0.0075 * len(MODELS[name])


def _draw_wide(band: SubFigure, draw: Callable[[Axes], None], top: float = 0.0) -> None:
    axes = band.subplots()
    height = band.bbox.height / band.dpi
    band.subplots_adjust(left=0.17, right=0.75, top=1 - top / height, bottom=0.05 / height)
    draw(axes)


def _sample_rows(results: DemoResults) -> list[Section]:
    return [
        Section(1.75, partial(_draw_samples, skill=skill, samples=samples))
        for skill, samples in results.samples_by_skill.items()
    ]


def _draw_samples(band: SubFigure, skill: str, samples: list[Sample]) -> None:
    from PIL import Image

    band.text(0.03, 0.5, skill, fontsize=11, weight="bold", va="center")
    width = 0.88 / max(3, len(samples))
    for index, sample in enumerate(samples):
        left = 0.115 + index * width
        axes = band.add_axes((left, 0.06, 1.5 / WIDTH, 0.88))
        with Image.open(sample.image) as image:
            axes.imshow(image.convert("RGB"), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        text = left + 1.6 / WIDTH
        question = "\n".join(textwrap.wrap(sample.question, 26))
        band.text(text, 0.9, question, fontsize=9.5, va="top", parse_math=False)
        band.text(text, 0.52, f"true: {sample.answer}", fontsize=9.5, parse_math=False)
        for line, name in enumerate(SHOWN):
            said = (
                f"{'✓' if sample.right[name] else '✗'} {MODELS[name]}: {sample.predictions[name]}"
            )
            band.text(
                text,
                0.34 - 0.17 * line,
                textwrap.shorten(said, 34, placeholder="..."),
                fontsize=9.5,
                color=RIGHT if sample.right[name] else WRONG,
                parse_math=False,
            )
