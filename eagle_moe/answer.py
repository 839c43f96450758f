"""Asking a checkpoint: conversations in, texts out; greedy, batched, padded on the left.

A conversation is what chat templates take: messages of a role and a content, which is a text or a
list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.

    answerer = Answerer.load("runs/demo/model", max_new_tokens=16)
    answerer([[{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                            {"type": "text", "text": "what is the text"}]}]])
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eagle_moe.load import load_ready

Images = Literal["keep", "drop"]
"""Whether the model sees the images; `drop` removes them and their placeholders: a blind model."""
Conversation = Sequence[dict[str, Any]]

MAX_NEW_TOKENS = 1024
"""Of an answer whose length nobody bounds: what the official Eagle evaluation allows."""
IMAGE_MEMORY = 2 << 30
"""Bytes of image tokens that are kept: 256 images of 1024 tokens of width 4096 in bfloat16."""


def image_keys(canvases: Tensor, how: bytes = b"") -> list[bytes]:
    """One key for each canvas (n,3,S,S), for image tokens that depend on it and on `how`."""
    return [hashlib.sha256(how + canvas.numpy().tobytes()).digest() for canvas in canvases]


class ImageMemory:
    """Image tokens of the canvases seen last, so that an image seen again is not encoded again.

    They are kept in the host's memory, at most `capacity` bytes; the least recently used one goes
    first. `seen` and `encoded` count images.
    """

    def __init__(self, capacity: int = IMAGE_MEMORY) -> None:
        self.capacity = capacity
        self.seen = self.encoded = self._bytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(
        self,
        canvases: Tensor,
        encode: Callable[[Tensor], Sequence[Tensor]],
        keys: Sequence[bytes] | None = None,
    ) -> list[Tensor]:
        """Canvases (n,3,S,S) -> image tokens (N,D) of each; `encode` does so for unknown ones.

        `keys`: their `image_keys`, if those are known.
        """
        keys = image_keys(canvases) if keys is None else keys
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: index for index, key in enumerate(keys) if key not in found}
        if missing:
            fresh = encode(canvases[list(missing.values())])
            found |= dict(zip(missing, fresh, strict=True))
        self.seen += len(keys)
        self.encoded += len(missing)
        for key in keys:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: bytes, tokens: Tensor) -> None:
        if key not in self._kept:
            if tokens.nbytes > self.capacity:
                return
            self._kept[key] = tokens.to("cpu", copy=True)
            self._bytes += tokens.nbytes
        self._kept.move_to_end(key)
        while self._bytes > self.capacity:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes


class Answerer:
    """A model and its processor, asked greedily. `beyond` counts prompts that are longer, with
    their answer, than what the language model was made for."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        images: Images = "keep",
        max_new_tokens: int = MAX_NEW_TOKENS,
        image_memory: int = IMAGE_MEMORY,
    ) -> None:
        if images not in ("keep", "drop"):
            raise ValueError(f'images = "{images}": it is "keep" or "drop".')
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: it must be at least 1.")
        self.model, self.processor = model, processor
        self.images, self.max_new_tokens = images, max_new_tokens
        self.memory = ImageMemory(image_memory)
        self.beyond = 0

    @classmethod
    def load(
        cls,
        folder: str | Path,
        images: Images = "keep",
        max_new_tokens: int = MAX_NEW_TOKENS,
        device: str | None = None,
        dtype: str = "auto",
    ) -> Self:
        """Load a checkpoint folder; see `eagle_moe.load.load_ready`."""
        model, processor = load_ready(folder, device, dtype, local_files_only=True)
        return cls(model, processor, images, max_new_tokens)

    def decoding(self, max_new_tokens: int | None = None, num_beams: int = 1) -> dict[str, Any]:
        """What `generate` is told: the most likely token, however a checkpoint samples."""
        return {
            "do_sample": False,
            "num_beams": num_beams,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "max_new_tokens": min(max_new_tokens or self.max_new_tokens, self.max_new_tokens),
        }

    def prompt(self, conversation: Conversation) -> str:
        """The rendered prompt, with one placeholder where each image goes."""
        return self.processor.apply_chat_template(
            self._seen(conversation), add_generation_prompt=True, tokenize=False
        )

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, conversations: Sequence[Conversation]) -> BatchFeature:
        """Model inputs of a batch, padded on the left as `generate` needs; on the host."""
        return self.processor.apply_chat_template(
            [self._seen(each) for each in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    @torch.inference_mode()
    def generate(
        self,
        inputs: BatchFeature,
        until: Sequence[str] = (),
        max_new_tokens: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """Answers to encoded conversations, each cut before the first text of `until` in it.

        An answer has at most `max_new_tokens` tokens, and never more than the answerer's own.
        """
        inputs = BatchFeature(dict(inputs))
        canvases = inputs.pop("pixel_values", None)
        options = self.decoding(max_new_tokens, num_beams)
        self._count_beyond(inputs["attention_mask"], options["max_new_tokens"])
        stops = [text for text in until if text]
        if stops:
            options |= {"stop_strings": stops, "tokenizer": self.processor.tokenizer}
        if self.model.generation_config.pad_token_id is None:
            options["pad_token_id"] = self.processor.tokenizer.pad_token_id
        if canvases is not None:
            tokens = self.memory(canvases, self._image_tokens)
            image = BaseModelOutputWithPooling(pooler_output=self._placed(tokens))
            options["mm_encoder_outputs"] = {"image": image}
        written = self.model.generate(**inputs.to(self.model.device), **options)
        written = written[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [_cut(text, stops) for text in texts]

    def __call__(self, conversations: Sequence[Conversation], **options: Any) -> list[str]:
        """One answer per conversation, in order; `options` are those of `generate`."""
        return self.generate(self.encode(conversations), **options)

    def _image_tokens(self, canvases: Tensor) -> list[Tensor]:
        outputs = self.model.get_image_features(canvases.to(self.model.device), return_dict=True)
        return list(outputs.pooler_output)

    def _placed(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        return [each.to(self.model.device) for each in tokens]

    def _seen(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The conversation as the template takes it, without images if those are dropped."""
        messages = []
        for message in conversation:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if self.images == "drop":
                content = [part for part in content if part["type"] != "image"]
            messages.append({**message, "content": content})
        return messages

    def _count_beyond(self, attention_mask: Tensor, max_new_tokens: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None:
            self.beyond += int((attention_mask.sum(1) + max_new_tokens > limit).sum())


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
