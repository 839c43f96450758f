"""The demo's page: one HTML file with everything inside, no script, no request."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from eagle_moe.scores.score import TOTAL
from eval.page import render, to_svg
from eval.report import figures, story
from eval.report.results import MODELS, CurvePoint, DemoResults, Sample

SHOWN = ("mixture", "clip_only")
"""Models whose answers stand beside the samples."""


def render_page(results: DemoResults) -> str:
    """The HTML text."""
    return render(
        Path(__file__).with_name("page.html.jinja"),
        title=story.TITLE,
        headline=story.headline(results),
        tiles=_tiles(results),
        leads=story.lead_sentences(results.lead),
        setting=story.setting(results),
        accuracy=_accuracy(results),
        models=[MODELS[name] for name in results.models],
        table=_table(results),
        samples={
            skill: [_sample(sample) for sample in samples]
            for skill, samples in results.samples_by_skill.items()
        },
        pixels=_pixels(results.samples),
        curves=_curves(results),
        legend=[(MODELS[name], figures.COLOURS[name]) for name in [*results.curves, "chance"]],
        probe=_probe(results),
        seconds=_seconds(results),
        time_sentence=story.time_sentence(results),
        terms=story.how_measured(results),
        ask=results.ask,
        caveats=story.caveats(results),
    )


def curves_of(results: DemoResults, skill: str) -> dict[str, list[CurvePoint]]:
    """Model -> its curve on one skill, for the models that have one."""
    found = {
        name: [point for point in points if point.skill == skill]
        for name, points in results.curves.items()
    }
    return {name: points for name, points in found.items() if points}


def _tiles(results: DemoResults) -> list[dict[str, str]]:
    tiles = []
    for name in results.models:
        score = results.accuracy[name][TOTAL]
        tiles.append(
            {
                "colour": figures.COLOURS[name],
                "number": f"{100 * score.mean:.0f} %",
                "label": MODELS[name],
                "interval": f"{100 * score.low:.1f} to {100 * score.high:.1f}",
            }
        )
    return tiles


def _accuracy(results: DemoResults) -> list[dict[str, str]]:
    panels = []
    for skill in (TOTAL, *results.skills):
        scores = {name: results.accuracy[name][skill] for name in results.models}
        draw = partial(figures.draw_accuracy, title=skill, scores=scores)
        text = "; ".join(f"{MODELS[name]} {story.percent(scores[name])}" for name in scores)
        panels.append({"text": f"{skill}: {text}", "svg": to_svg(f"accuracy-{skill}", draw)})
    return panels


def _table(results: DemoResults) -> list[dict[str, Any]]:
    rows = []
    for skill in (TOTAL, *results.skills):
        cells = []
        for name in results.models:
            score = results.accuracy[name][skill]
            cells.append(
                f"{100 * score.mean:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})"
            )
        rows.append({"skill": skill, "cells": cells, "n": results.accuracy["mixture"][skill].n})
    return rows


def _sample(sample: Sample) -> dict[str, Any]:
    said = [
        {"model": MODELS[name], "text": sample.predictions[name], "right": sample.right[name]}
        for name in SHOWN
    ]
    png = base64.b64encode(sample.image.read_bytes()).decode()
    return {"question": sample.question, "answer": sample.answer, "png": png, "said": said}


def _pixels(samples: Sequence[Sample]) -> str:
    if not samples:
        return "small"
    with Image.open(samples[0].image) as image:
        return f"{image.width} by {image.height} pixels"


def _curves(results: DemoResults) -> list[dict[str, str]]:
    panels = []
    for skill in (TOTAL, *results.skills):
        curves = curves_of(results, skill)
        if not curves:
            continue
        chance = results.accuracy["chance"][skill].mean
        draw = partial(figures.draw_curves, title=skill, curves=curves, chance=chance)
        last = {name: max(points, key=lambda point: point.step) for name, points in curves.items()}
        text = "; ".join(
            f"{MODELS[name]} {point.exact_match:.0%} after {point.step} steps"
            for name, point in last.items()
        )
        panels.append({"text": f"{skill}: {text}", "svg": to_svg(f"curve-{skill}", draw)})
    return panels


def _probe(results: DemoResults) -> str | None:
    if results.probe is None:
        return None
    size = (5.6, 0.5 + 0.32 * len(results.probe.rows))
    return to_svg("probe", partial(figures.draw_probe, probe=results.probe), size)


def _seconds(results: DemoResults) -> str:
    size = (5.6, 0.2 + 0.26 * len(results.seconds))
    return to_svg("seconds", partial(figures.draw_seconds, seconds=results.seconds), size)
