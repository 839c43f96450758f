"""A conversation with a model: turns and images in, text out piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, StoppingCriteriaList, TextIteratorStreamer

from eagle_moe.build import load_model
from eagle_moe.canvas import ImageSource, load_image
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor


class ChatSession:
    """Keeps the turns; an image belongs to the question that follows it."""

    def __init__(
        self, model: EagleMixForConditionalGeneration, processor: EagleMixProcessor
    ) -> None:
        self.model = model
        self.processor = processor
        self.reset()

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", dtype: str = "auto") -> ChatSession:
        """Load model and processor from a checkpoint's folder; `device` "auto" is the best one.

        Raises `ValueError` if `folder` holds no complete model.
        """
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = accelerator.type if accelerator else "cpu"
        model = load_model(folder, dtype=dtype).eval()
        try:
            return cls(model.to(device), AutoProcessor.from_pretrained(folder))
        except OSError as error:
            raise ValueError(f"{folder}: no processor beside the model: {error}") from None
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {device}: {error}") from None

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []

    def add_image(self, source: ImageSource) -> None:
        """Show an image with the next question. Raises `ValueError` if it cannot be opened."""
        self._images.append({"type": "image", "image": load_image(source)})

    def ask(self, text: str, max_new_tokens: int = 512) -> Generator[str]:
        """Yield the answer as it is written; what was written joins the conversation."""
        question = {"role": "user", "content": [*self._images, {"type": "text", "text": text}]}
        inputs = self._encode([*self.turns, question], max_new_tokens)
        answer = ""
        try:
            for piece in self._stream(inputs, max_new_tokens):
                answer += piece
                yield piece
        finally:
            written = {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}
            self.turns += [question, written]
            self._images = []

    def _encode(self, turns: list[dict[str, Any]], max_new_tokens: int) -> Any:
        inputs = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and length + max_new_tokens > limit:
            raise ValueError(
                f"the conversation has {length} tokens and the answer may have {max_new_tokens}, "
                f"but the model reads {limit}. Start anew, or allow a shorter answer."
            )
        return inputs.to(self.model.device)

    def _stream(self, inputs: Any, max_new_tokens: int) -> Iterator[str]:
        """Run `generate` in a thread; stop it if the reader goes away."""
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        stop, errors = threading.Event(), []

        def stopped(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), stop.is_set(), device=ids.device)

        def generate() -> None:
            try:
                self.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )
            except Exception as error:  # handed to the reader's thread
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            stop.set()
            thread.join()
        if errors:
            raise errors[0]
