"""From a folder to a model that can be asked: weights, processor, device, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from eagle_moe.build import load_model
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor


def load_ready(
    folder: str | Path,
    device: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    local_files_only: bool = False,
) -> tuple[EagleMixForConditionalGeneration, EagleMixProcessor]:
    """Model and processor of a checkpoint's folder or a release, ready to be asked.

    `device` None or "auto" is the best one; `dtype` "auto" is that of the weights; `quantize` is of
    `eagle_moe.quantization.Quantize`. Raises `ValueError` for a folder that is no complete
    checkpoint, weights that are not finite, a processor that is not this model's, or a device that
    is not there.
    """
    if device is None or device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    model = load_model(folder, quantize, dtype=dtype, local_files_only=local_files_only)
    for name, weight in model.named_parameters():
        plain = type(weight.data) is Tensor and weight.is_floating_point()
        if plain and not torch.isfinite(weight).all():
            raise ValueError(f"{folder}: `{name}` has a value that is not a finite number.")
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=local_files_only)
    except OSError as error:
        raise ValueError(f"{folder}: no processor beside the model: {error}") from None
    check_processor(model.config, processor, str(folder))
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device}: {error}") from None


def check_processor(config: Any, processor: Any, source: str) -> None:
    """Raise `ValueError` naming `source` and both values if a processor is not the model's."""
    canvas = getattr(getattr(processor, "image_processor", None), "size", None)
    pairs = {
        "tokens per image": (
            getattr(processor, "image_seq_length", None),
            config.num_image_tokens,
        ),
        "the image placeholder's id": (
            getattr(processor, "image_token_id", None),
            config.image_token_id,
        ),
        "the canvas's size": (
            None if canvas is None else canvas["height"],
            config.vision_config.canvas_size,
        ),
    }
    for what, (told, needed) in pairs.items():
        if told != needed:
            raise ValueError(
                f"{source}: the processor does not match the model: {what} is {told} in the "
                f"processor, but {needed} in the model. Save the model with its own processor."
            )
    words, rows = len(processor.tokenizer), config.text_config.vocab_size
    if words > rows:
        raise ValueError(
            f"{source}: the processor does not match the model: its tokenizer knows {words} "
            f"tokens, but the model has {rows}. Save the model with its own processor."
        )
    if processor.chat_template is None:
        raise ValueError(
            f"{source}: the processor has no chat template, so that no question can be asked. "
            "Save it with the template that the model was trained with."
        )
