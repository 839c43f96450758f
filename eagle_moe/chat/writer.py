"""Writing answers: one model, any number of conversations, one answer at a time."""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eagle_moe import explain
from eagle_moe.answer import IMAGE_MEMORY, Conversation, ImageMemory, image_keys
from eagle_moe.chat.prefixes import (
    PREFIX_MEMORY,
    PrefixMemory,
    caches_by_default,
    new_cache,
    prompt_of,
)
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import tensor_hash
from eagle_moe.processor import EagleMixProcessor
from eagle_moe.schema import nearest

WAIT = 0.05
"""Seconds between two looks at whether a reader in the queue is still there."""


class Writer:
    """Answers conversations with one model. An image is encoded once, and what one conversation
    shares with an earlier one is read once; answers are the same as without.

    Any number of threads may ask; one answer is written at a time, the others wait.
    """

    def __init__(
        self,
        model: EagleMixForConditionalGeneration,
        processor: EagleMixProcessor,
        image_memory: int = IMAGE_MEMORY,
        prefix_memory: int = PREFIX_MEMORY,
    ) -> None:
        self.model, self.processor = model, processor
        self.images = ImageMemory(image_memory)
        self.prefixes = PrefixMemory(prefix_memory)
        self._turn = threading.Lock()

    def write(
        self,
        conversation: Conversation,
        max_new_tokens: int,
        silenced: Collection[str] = (),
        means: explain.Maps | None = None,
    ) -> Generator[str]:
        """Yield the answer to a conversation that ends in a question. Closing this stops it.

        The experts `silenced` show nothing of the images: their maps are replaced by `means`
        (C,h,w) (`explain.reference_means`). Without means, by their maps of an empty image, in the
        colour that the processor pads with; a model has seldom seen one, so that the answer may
        suffer from that, too.

        Raises `ValueError` for an unknown expert, or if the model cannot read that much.
        """
        self._check_names(silenced)
        inputs = self._encode(conversation, max_new_tokens)
        streamer = TextIteratorStreamer(
            self.processor.tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
        )
        stop, errors = threading.Event(), []

        def run() -> None:
            try:
                with self._my_turn(stop):
                    if not stop.is_set():
                        options = self._options(stop, streamer, max_new_tokens)
                        self._generate(inputs, frozenset(silenced), means, options)
            except Exception as error:  # handed to the reader's thread
                errors.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            stop.set()
            thread.join()
        if errors:
            raise errors[0]

    def _check_names(self, silenced: Collection[str]) -> None:
        names = list(self.model.model.vision_tower.towers)
        for name in silenced:
            if name not in names:
                raise ValueError(f'no expert "{name}" in this model.{nearest(name, names)}')

    def _encode(self, conversation: Conversation, max_new_tokens: int) -> Any:
        inputs = self.processor.apply_chat_template(
            list(conversation),
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
        return inputs

    @contextmanager
    def _my_turn(self, stop: threading.Event) -> Iterator[None]:
        """Wait until no other answer is written, or the reader has gone."""
        mine = self._turn.acquire(timeout=WAIT)
        while not mine and not stop.is_set():
            mine = self._turn.acquire(timeout=WAIT)
        try:
            yield
        finally:
            if mine:
                self._turn.release()

    def _options(
        self, stop: threading.Event, streamer: TextIteratorStreamer, max_new_tokens: int
    ) -> dict[str, Any]:
        def stopped(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.full((ids.shape[0],), stop.is_set(), device=ids.device)

        return {
            "max_new_tokens": max_new_tokens,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([stopped]),
        }

    @torch.no_grad()
    def _generate(
        self,
        inputs: Any,
        silenced: frozenset[str],
        means: explain.Maps | None,
        options: dict[str, Any],
    ) -> None:
        config, inputs = self.model.config, dict(inputs)
        canvases = inputs.pop("pixel_values", torch.empty(0, 3, 0, 0, dtype=torch.uint8))
        means = self._means(means) if silenced else {}
        keys = image_keys(canvases, _silence_key(silenced, means))
        prompt = prompt_of(
            inputs["input_ids"][0], keys, config.image_token_id, config.num_image_tokens
        )
        plain = caches_by_default(self.model.generation_config)
        cache, known = (self.prefixes.take(prompt) if plain else None) or (None, 0)
        read = sum(start < known for start in prompt.starts)
        if len(keys) > read:

            def encode(missing: Tensor) -> Sequence[Tensor]:
                return self._image_tokens(missing, silenced, means)

            tokens = self.images(canvases[read:], encode, keys[read:])
            placed = [each.to(self.model.device) for each in tokens]
            image = BaseModelOutputWithPooling(pooler_output=placed)
            options["mm_encoder_outputs"] = {"image": image}
        if plain:
            cache = cache or new_cache(self.model)
            options["past_key_values"] = cache
        on_device = {name: value.to(self.model.device) for name, value in inputs.items()}
        written = self.model.generate(**on_device, **options)
        if plain and cache is not None:
            whole = prompt_of(written[0], keys, config.image_token_id, config.num_image_tokens)
            self.prefixes.keep(whole, cache)

    def _image_tokens(
        self, canvases: Tensor, silenced: frozenset[str], means: explain.Maps
    ) -> list[Tensor]:
        """Canvases (n,3,S,S) -> image tokens (N,D) of each."""
        seen: Any = canvases.to(self.model.device)
        if silenced:
            seen = explain.silence(explain.encode(self.model, canvases), means, silenced)
        return list(self.model.get_image_features(seen, return_dict=True).pooler_output)

    def _means(self, means: explain.Maps | None) -> explain.Maps:
        return self._blank if means is None else means

    @cached_property
    def _blank(self) -> explain.Maps:
        """The maps (C,h,w) of an image in the colour that the processor pads with."""
        processor: Any = self.processor.image_processor
        empty = Image.new("RGB", (1, 1), tuple(processor.fill))
        return explain.reference_means(self.model, processor, [empty])


def _silence_key(silenced: frozenset[str], means: explain.Maps) -> bytes:
    """What image tokens depend on, beside the image: which experts are silenced, and by what."""
    return "".join(f"{name} {tensor_hash(means[name])}\n" for name in sorted(silenced)).encode()
