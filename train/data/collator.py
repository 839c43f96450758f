"""Samples -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train.data.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from eagle_moe.processor import EagleMixProcessor


class Collator:
    """Pads on the right, as training wants, whatever the tokenizer's own side is.

    The batch is `{"input_ids", "labels", "attention_mask": (B,T) int64}`, plus `"pixel_values"`
    (num_images,3,S,S) uint8, the pictures of all samples in prompt order, if there is any.

    Raises `ValueError` if the tokenizer has no pad token, or if the image tokens of a sample do
    not match its pictures.
    """

    def __init__(self, processor: EagleMixProcessor) -> None:
        if processor.tokenizer.pad_token_id is None:
            raise ValueError(
                "tokenizer: it has no pad token, so samples of different lengths make no batch. "
                "Set one, e.g. tokenizer.pad_token = tokenizer.eos_token, and save the processor."
            )
        self.pad_token_id = int(processor.tokenizer.pad_token_id)
        self.image_token_id = processor.image_token_id
        self.num_image_tokens = processor.image_seq_length

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        for sample in samples:
            self._check(sample)
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(
                [sample["labels"] for sample in samples],
                batch_first=True,
                padding_value=IGNORE_INDEX,
            ),
            # from the lengths, not from the ids: a text may hold the pad token itself
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        canvases = [canvas for sample in samples for canvas in sample["pixel_values"]]
        if canvases:
            batch["pixel_values"] = torch.stack(canvases)
        return batch

    def _check(self, sample: dict[str, Any]) -> None:
        found = int((sample["input_ids"] == self.image_token_id).sum())
        images = len(sample["pixel_values"])
        if found != images * self.num_image_tokens:
            raise ValueError(
                f'sample "{sample["id"]}": {found} image tokens for {images} images of '
                f"{self.num_image_tokens} tokens each. Was it encoded with another processor?"
            )
