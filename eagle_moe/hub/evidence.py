"""What was measured of a model, on its card: score cards, and what each expert adds.

Copied into the release, so that whoever has it can recount them. Every number is recounted from its
answers here as well, and refused if it was measured on other weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle_moe.hub.scan import without_local_paths
from eagle_moe.schema import Schema
from eagle_moe.scores.answer import ITEMS
from eagle_moe.scores.card import CARD, Card, Score, write_json
from eagle_moe.scores.identity import hash_weights
from eagle_moe.scores.score import TOTAL

SCORES = "scores"
"""Folder of the score cards in a release, a folder per task."""
EXPERTS, EXPERTS_PICTURE = "experts.json", "experts.png"
"""What `python -m eval.experts` leaves, and what it is called in a release."""


def copy_scores(folder: Path, scores: Sequence[Path], name: str) -> None:
    """Each task's card and answers, without the paths of the machine that measured them."""
    for given in map(Path, scores):
        found = (
            [given]
            if (given / CARD).is_file()
            else sorted(p.parent for p in given.glob(f"*/{CARD}"))
        )
        if not found:
            raise FileNotFoundError(f"{given}: no {CARD} in it or in a folder of it.")
        for task in found:
            card = Card.load(task)  # recounted
            target = folder / SCORES / task.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(task / ITEMS, target / ITEMS)
            data = without_local_paths({**card.dump(), "model": name})
            write_json(target / CARD, Card.parse(data, str(target / CARD)).dump())


def check_weights(folder: Path, cards: Mapping[str, Card]) -> None:
    """Raise `ValueError` for a score that was measured on weights other than those in `folder`."""
    weights = hash_weights(folder)
    for task, card in cards.items():
        if card.identity.weights_sha256 != weights:
            raise ValueError(
                f"{folder / SCORES / task / CARD}: a score of other weights "
                f"({card.identity.weights_sha256[:12]}) than these ({weights[:12]}). Evaluate this "
                "model, or leave the score out."
            )


class _ExpertsPage(Schema, extra="ignore"):
    """Of `experts.json`, what the caption needs and what identifies it."""

    reference: int
    scores: dict[str, dict[str, dict[str, Score]]]
    identity: dict[str, Any]


def copy_experts_page(folder: Path, page: Path | None, name: str) -> str:
    """Copies the matrix and its picture; the caption, or nothing if there is none."""
    source = folder if page is None else Path(page)
    if page is None and not (folder / EXPERTS).is_file():
        return ""
    for needed in (EXPERTS, EXPERTS_PICTURE):
        if not (source / needed).is_file():
            raise FileNotFoundError(
                f"{source / needed}: no such file. Run `python -m eval.experts`."
            )
    data = json.loads((source / EXPERTS).read_text(encoding="utf-8"))
    matrix = _ExpertsPage.parse(data, str(source / EXPERTS))
    weights = matrix.identity.get("weights_sha256", "")
    if weights != hash_weights(folder):
        raise ValueError(
            f"{source / EXPERTS}: measured on other weights ({weights[:12]}) than these. Run "
            "`python -m eval.experts` on this model, or leave it out."
        )
    if source != folder:
        shutil.copyfile(source / EXPERTS_PICTURE, folder / EXPERTS_PICTURE)
        write_json(folder / EXPERTS, without_local_paths({**data, "model": name}))
    n = next(iter(next(iter(matrix.scores.values())).values()))[TOTAL].n
    return (
        f"Measured on {n:,} questions by silencing one expert at a time: the rest of the model "
        f"gets the mean of its maps over {matrix.reference:,} reference images in place of its "
        "map of this image. Nothing is trained again, so this is what the model as it is would "
        "lose, and not what a model trained without that expert would lack. Faint where the 95 % "
        "interval holds zero."
    )


def show_card(card: Card) -> dict[str, Any]:
    """What the page shows of a score card: every metric and part, and what identifies them."""
    identity = card.identity
    most = identity.decoding.get("max_new_tokens")
    limit = f", at most {most} new tokens" if most else ""
    shown = "shown" if identity.task.images == "keep" else "not shown"
    versions = ", ".join(
        f"{name} {identity.versions[name]}"
        for name in ("eagle-moe", "torch", "transformers", "lmms_eval")
        if name in identity.versions
    )
    return {
        "name": card.task,
        "rows": [
            _row(metric, part, score)
            for metric, parts in card.metrics.items()
            for part, score in parts.items()
        ],
        "not_run": card.not_run,
        "notes": card.notes,
        "setting": (
            f"Split {identity.task.split}, task version {identity.task.version or 'unknown'}, "
            f"questions `{identity.task.data_sha256[:12]}`, weights "
            f"`{identity.weights_sha256[:12]}`, {identity.dtype} on {identity.device}, batches of "
            f"{identity.batch_size}, images {shown}{limit}; {versions}. Everything that identifies "
            f"it: `{SCORES}/{card.task}/{CARD}`."
        ),
    }


def _row(metric: str, part: str, score: Score) -> list[str]:
    ends = "none given"
    if score.low is not None and score.high is not None:
        ends = f"{_number(score.low)} to {_number(score.high)}"
    return [metric, part, _number(score.value), ends, f"{score.n:,}"]


def _number(value: float) -> str:
    """Three digits after the point for shares of one, one for points and percent."""
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:,.1f}"
