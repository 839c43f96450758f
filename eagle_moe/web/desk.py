"""What all visitors share: the model, its limits, and what silenced experts give instead."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from eagle_moe import explain
from eagle_moe.chat.session import ChatSession
from eagle_moe.chat.terminal import describe
from eagle_moe.heatmap import replaced
from eagle_moe.limits import Limits
from eagle_moe.web.added import render, weigh_answer

THUMBNAIL = 512
"""Pixels of the longer side of an image in the conversation."""


@dataclass(frozen=True)
class Reference:
    """The mean maps over `count` images; `source` says which, in words."""

    means: explain.Maps
    count: int
    source: str


def load_reference(session: ChatSession, images: Sequence[Path], source: str) -> Reference:
    """Mean maps of every expert over `images`."""
    processor = session.processor.image_processor
    return Reference(explain.reference_means(session.model, processor, images), len(images), source)


class Desk:
    """One model for all visitors. Visitors' pictures are kept in `folder`."""

    def __init__(
        self,
        session: ChatSession,
        reference: Reference,
        limits: Limits,
        folder: Path,
        max_new_tokens: int,
    ) -> None:
        self.session, self.reference, self.limits = session, reference, limits
        self.folder, self.max_new_tokens = folder, max_new_tokens
        self.experts = list(session.model.model.vision_tower.towers)

    @property
    def description(self) -> str:
        """The model in one line."""
        return describe(self.session)

    @property
    def silencing(self) -> str:
        """What it means that an expert is off."""
        text = (
            f"An expert that is off is silenced: {replaced(self.reference.count)} "
            f"({self.reference.source}). The others see the image as before, and nothing is "
            "trained again: this shows what this model does without that expert's view, not what "
            "a model trained without it would do."
        )
        if self.session.model.generation_config.do_sample:
            text += " This model draws its words at random, so answers differ by chance, too."
        return text

    def canvas(self, image: Image.Image) -> Image.Image:
        """What the model sees of an image, so that no more of it is kept: a square of its size."""
        pixels = self.session.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())

    def thumbnail(self, image: Image.Image, name: str) -> Path:
        """What the page shows of an image, as a file called like its own."""
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        path = self.folder / "shown" / uuid4().hex / f"{Path(name).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.save(path)
        return path

    def weigh(
        self, asked: Sequence[dict[str, Any]], question: str, answer: str, names: Sequence[str]
    ) -> str:
        """HTML: what each expert added to the answer to `asked`, whose images have `names`."""
        session, reference = self.session, self.reference
        added = weigh_answer(session.model, session.processor, asked, answer, reference.means)
        return render(added, question, answer, names, reference.count, reference.source)

    def write(self, asked: Sequence[dict[str, Any]], silenced: Collection[str]) -> Generator[str]:
        """The answer to the conversation `asked`, piece by piece."""
        means = self.reference.means
        return self.session.writer.write(asked, self.max_new_tokens, silenced, means)
