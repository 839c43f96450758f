"""Samples, or rows of packed samples -> one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train.data.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from eagle_moe.processor import EagleMixProcessor

Sample = dict[str, Any]

NOT_FOR_THE_MODEL = ("sample_ids", "seen")
"""What a batch holds about its samples."""


class Collator:
    """Pads on the right, as training wants, whatever the tokenizer's own side is.

    A batch of samples is `{"input_ids", "labels", "attention_mask": (B,T) int64}`. A batch of rows
    (lists of samples, `train.data.packing`) has, in place of the mask, what keeps samples apart:

    - `"position_ids"` (B,T) int64, which restart with every sample. From them transformers makes a
      block-diagonal mask for the sdpa, eager and flex backends.
    - `"cu_seq_lens_q"`, `"cu_seq_lens_k"` (segments + 1,) int32, `"max_length_q"`, `"max_length_k"`
      int: where the segments of all rows begin, one after the other. Flash attention needs them:
      it reads positions for a single row alone, and would mix samples in a batch of several.
    - `"use_cache"`: False. With a cache transformers makes no block-diagonal mask.

    Both have, if there are images, `"pixel_values"` (num_images,3,S,S) uint8, in prompt order, and
    two lists that are not for the model (`NOT_FOR_THE_MODEL`): `"sample_ids"`, str, and `"seen"`,
    by which a trainer has its data set count what it used (`train.data.dataset.Seen`).

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

    def __call__(self, items: Sequence[Sample] | Sequence[list[Sample]]) -> dict[str, Any]:
        rows = [item if isinstance(item, list) else [item] for item in items]
        samples = [sample for row in rows for sample in row]
        for sample in samples:
            self._check(sample)
        ids = [torch.cat([sample["input_ids"] for sample in row]) for row in rows]
        labels = [torch.cat([_targets(sample) for sample in row]) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        if isinstance(items[0], list):
            batch |= _boundaries([[len(sample["input_ids"]) for sample in row] for row in rows])
        else:
            # from the lengths, not from the ids: a text may hold the pad token itself
            masks = [torch.ones_like(row) for row in ids]
            batch["attention_mask"] = pad_sequence(masks, batch_first=True)
        canvases = [canvas for sample in samples for canvas in sample["pixel_values"]]
        if canvases:
            batch["pixel_values"] = torch.stack(canvases)
        batch["sample_ids"] = [sample["id"] for sample in samples]
        batch["seen"] = [sample["seen"] for sample in samples]
        return batch

    def _check(self, sample: Sample) -> None:
        found = int((sample["input_ids"] == self.image_token_id).sum())
        images = len(sample["pixel_values"])
        if found != images * self.num_image_tokens:
            raise ValueError(
                f'sample "{sample["id"]}": {found} image tokens for {images} images of '
                f"{self.num_image_tokens} tokens each. Was it encoded with another processor?"
            )


def _targets(sample: Sample) -> Tensor:
    """Labels without the first: alone, nothing predicts it; in a row, another sample would."""
    labels = sample["labels"].clone()
    labels[0] = IGNORE_INDEX
    return labels


def _boundaries(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What tells attention where samples of these lengths begin; padding is a segment of its own.

    Names are those of transformers (`find_packed_sequence_indices`, `FlashAttentionKwargs`).
    """
    width = max(map(sum, rows))
    segments = [length for row in rows for length in (*row, width - sum(row)) if length]
    positions = np.concatenate([np.arange(length) for length in segments])
    starts = torch.tensor(np.cumsum([0, *segments]), dtype=torch.int32)
    return {
        "position_ids": torch.from_numpy(positions).view(len(rows), width),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(segments),
        "max_length_k": max(segments),
        "use_cache": False,
    }
