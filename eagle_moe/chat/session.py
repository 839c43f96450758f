"""A conversation with a model: turns and images in, text out piece by piece.

session = ChatSession.load("runs/demo/model")
session.add_image("picture.png")
print("".join(session.ask("what is the text")))
print("".join(session.again({"sam"})))       # the same question, one expert silenced
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any, Self

from PIL import Image

from eagle_moe import explain
from eagle_moe.canvas import ImageSource, load_image
from eagle_moe.chat.writer import Writer
from eagle_moe.load import load_ready
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor


class ChatSession:
    """Keeps the turns; an image belongs to the question that follows it.

    - `turns`: what was said, as chat templates take it; it may be edited between questions.
    - `silenced`: experts that show nothing of the images from now on; see `Writer.write`.
    - `means`: what they show instead (`explain.reference_means`); None: their view of nothing.
    """

    def __init__(
        self, model: EagleMixForConditionalGeneration, processor: EagleMixProcessor
    ) -> None:
        self.model = model
        self.processor = processor
        self.writer = Writer(model, processor)
        self.silenced: set[str] = set()
        self.means: explain.Maps | None = None
        self.reset()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
    ) -> Self:
        """Load model and processor; see `eagle_moe.load.load_ready`."""
        return cls(*load_ready(folder, device, dtype, quantize))

    def another(self) -> Self:
        """A conversation of its own with the same model, which is loaded once.

        Both may be asked from different threads: one answer is written at a time. An image that
        both look at is encoded once.
        """
        session = copy.copy(self)
        session.silenced = set()
        session.reset()
        return session

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []

    def add_image(self, source: ImageSource) -> None:
        """Show an image with the next question. Raises `ValueError` if it cannot be opened.

        What is kept of it is the canvas that the model sees.
        """
        image_processor: Any = self.processor.image_processor
        canvas = image_processor(load_image(source), return_tensors="pt")["pixel_values"][0]
        image = Image.fromarray(canvas.permute(1, 2, 0).numpy())
        self._images.append({"type": "image", "image": image})

    def ask(self, text: str, max_new_tokens: int = 512) -> Generator[str]:
        """Yield the answer as it is written; what was written joins the conversation.

        Closing the generator ends the answer. After an error the conversation is as before.
        """
        question = {"role": "user", "content": [*self._images, {"type": "text", "text": text}]}
        turns = [*self.turns, question]
        pieces = self.writer.write(turns, max_new_tokens, self.silenced, self.means)
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        except GeneratorExit:  # the reader has read enough
            pieces.close()
        written = {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}
        self.turns += [question, written]
        self._images = []

    def again(self, silenced: Collection[str], max_new_tokens: int = 512) -> Generator[str]:
        """Yield the answer to the last question with the experts `silenced`, out of interest.

        The conversation stays as it is.
        """
        if not self.turns:
            raise ValueError("nothing has been asked yet. Ask a question first.")
        yield from self.writer.write(self.turns[:-1], max_new_tokens, silenced, self.means)
