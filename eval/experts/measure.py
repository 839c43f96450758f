"""Items -> how the model takes their right answers with every expert, and with some silenced."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eagle_moe import explain
from eagle_moe.answer import Answerer
from eagle_moe.canvas import load_image
from eagle_moe.scores.answer import ITEMS
from eagle_moe.scores.card import ACCURACY
from eval.items import Item
from eval.kept import KeptTexts, OnProgress

LOG_PROB = "log_prob"
ALL, NONE = "all", "none"
"""Variants: no expert silenced, every expert silenced."""

Scores = dict[str, dict[str, float]]
"""Variant -> `log_prob` and `accuracy` of one item."""


@dataclass(frozen=True)
class Measured:
    """One item, measured: a line of `items.jsonl.gz`."""

    id: str
    skill: str
    question: str
    answer: str
    scores: Scores


def without(expert: str) -> str:
    """The variant in which this expert alone is silenced."""
    return f"without {expert}"


def only(expert: str) -> str:
    """The variant in which every other expert is silenced."""
    return f"only {expert}"


def variants(experts: Sequence[str]) -> dict[str, frozenset[str]]:
    """Variant -> the experts that are silenced in it."""
    every = frozenset(experts)
    return {
        ALL: frozenset(),
        **{without(name): frozenset({name}) for name in experts},
        **{only(name): every - {name} for name in experts},
        NONE: every,
    }


def conversation(item: Item, image: Image.Image | None = None) -> list[dict[str, Any]]:
    """The item as a user asks it: its image (its path, unless it is given), then its question."""
    content = [
        {"type": "image", "image": image or item.image},
        {"type": "text", "text": item.question},
    ]
    return [{"role": "user", "content": content}]


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """In batches of `size`; questions about one image side by side, so that it is encoded once."""
    ordered = sorted(items, key=lambda item: str(item.image))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def measure(
    answerer: Answerer,
    items: Sequence[Item],
    silenced: Mapping[str, Collection[str]],
    means: explain.Maps,
    kept: KeptTexts,
    batch_size: int,
    progress: OnProgress | None = None,
) -> list[Measured]:
    """Score the right answer to every item under every variant of `silenced`, in one go.

    Maps of an image are computed once and serve all variants. What is in `kept` is not measured
    again; batches are the same in every run, wherever the last one stopped.
    """
    done = 0
    for batch in batches(items, batch_size):
        if any(item.id not in kept for item in batch):
            found = _score(answerer, batch, silenced, means)
            for item, scores in zip(batch, found, strict=True):
                kept[item.id] = json.dumps(scores)
        done += len(batch)
        if progress is not None:
            progress(done, len(items), "questions")
    return [
        Measured(item.id, item.skill, item.question, item.answer, json.loads(kept[item.id]))
        for item in items
    ]


@torch.inference_mode()
def _score(
    answerer: Answerer,
    batch: Sequence[Item],
    silenced: Mapping[str, Collection[str]],
    means: explain.Maps,
) -> list[Scores]:
    paths = [item.image for item in batch if item.image is not None]
    assert len(paths) == len(batch)
    images = {path: load_image(path) for path in paths}
    asked = explain.prepare(
        answerer.processor,
        [conversation(item, images[path]) for item, path in zip(batch, paths, strict=True)],
        [item.answer for item in batch],
    )
    first = [paths.index(path) for path in images]
    place = torch.tensor([list(images).index(path) for path in paths])
    once = explain.encode(answerer.model, asked.canvases[first])
    maps = {name: x[place.to(x.device)] for name, x in once.items()}
    found: dict[frozenset[str], list[dict[str, float]]] = {}
    for names in map(frozenset, silenced.values()):
        if names not in found:  # of two experts, only one is without the other
            one = explain.score(answerer.model, asked, explain.silence(maps, means, names))
            pairs = zip(one.log_prob.tolist(), one.exact.tolist(), strict=True)
            found[names] = [{LOG_PROB: p, ACCURACY: float(exact)} for p, exact in pairs]
    return [
        {variant: found[frozenset(names)][row] for variant, names in silenced.items()}
        for row in range(len(batch))
    ]


def write_measured(folder: Path, measured: Sequence[Measured]) -> None:
    """Write `folder/items.jsonl.gz`; the same measurements always give the same bytes."""
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in measured)
    beside = folder / f"{ITEMS}.part"
    beside.write_bytes(gzip.compress(lines.encode(), mtime=0))
    os.replace(beside, folder / ITEMS)


def read_measured(folder: str | Path) -> list[Measured]:
    """Read what `write_measured` wrote."""
    lines = gzip.decompress((Path(folder) / ITEMS).read_bytes()).decode().split("\n")[:-1]
    return [Measured(**json.loads(line)) for line in lines]
