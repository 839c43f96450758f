"""What a saved model does with fixed inputs, seen from a process of its own.

    python -P probe.py FOLDER package|remote DEVICE OUT.json

`package` imports eagle_moe and loads as its users do. `remote` knows transformers only and sets
`trust_remote_code`. For that this file imports nothing of the project, and is run by its path.
What went wrong is in OUT.json under `error`, after all that was seen before.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZES = ((96, 40), (30, 80), (64, 64), (17, 5))
"""Width and height of the pictures: wide, tall, square, tiny."""
QUESTIONS = (((0,), "What is this?"), ((1,), "Read the text."), ((), "Hello"), ((2, 3), "Compare."))
"""(pictures, text) of each row: also one without a picture, and one with two."""
NEW_TOKENS = 8
ENTRIES = 512
"""Entries of the vocabulary whose logits are kept, evenly spaced."""


def pictures() -> list[Image.Image]:
    """Blocks of colours, the same ones everywhere."""
    blocks = np.random.default_rng(7).integers(0, 256, (len(SIZES), 4, 6, 3), dtype=np.uint8)
    return [
        Image.fromarray(block).resize(size, Image.Resampling.NEAREST)
        for block, size in zip(blocks, SIZES, strict=True)
    ]


def conversations() -> list[list[dict[str, Any]]]:
    """One conversation per row, as chat templates take them."""
    seen = pictures()
    return [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": seen[index]} for index in indices),
                    {"type": "text", "text": text},
                ],
            }
        ]
        for indices, text in QUESTIONS
    ]


def observe_processor(processor: Any) -> dict[str, Any]:
    """Settings, prompts, token ids and canvases."""
    image_processor = processor.image_processor
    rows = [_encode(processor, [row]) for row in conversations()]
    return {
        "settings": {
            "size": dict(image_processor.size),
            "fit": image_processor.fit,
            "fill": list(image_processor.fill),
            "image_seq_length": processor.image_seq_length,
            "image_token": processor.image_token,
        },
        "prompts": [
            processor.apply_chat_template(row, add_generation_prompt=True, tokenize=False)
            for row in conversations()
        ],
        "ids": [row["input_ids"][0].tolist() for row in rows],
        "canvases": [
            [hashlib.sha256(canvas.numpy().tobytes()).hexdigest() for canvas in row["pixel_values"]]
            if "pixel_values" in row
            else []
            for row in rows
        ],
    }


def observe_model(model: Any, processor: Any) -> dict[str, Any]:
    """Logits of the token that comes next, and greedy text: row by row, and all rows at once."""
    rows = conversations()
    tokens = model.get_image_features(
        _encode(processor, rows)["pixel_values"].to(model.device), return_dict=True
    ).pooler_output
    singles = [_answer(model, processor, [row]) for row in rows]
    logits, texts = _answer(model, processor, rows)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_tokens": sorted({len(each) for each in tokens}),
        "logits": [single[0][0] for single in singles],
        "texts": [single[1][0] for single in singles],
        "batch_logits": logits,
        "batch_texts": texts,
    }


def _encode(processor: Any, rows: list[list[dict[str, Any]]]) -> Any:
    return processor.apply_chat_template(
        rows,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.inference_mode()
def _answer(
    model: Any, processor: Any, rows: list[list[dict[str, Any]]]
) -> tuple[list[list[float]], list[str]]:
    """Logits (rows, `ENTRIES`) after each prompt, and the texts that follow."""
    inputs = _encode(processor, rows).to(model.device)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1].float().cpu()
    entries = np.linspace(0, logits.shape[1] - 1, min(ENTRIES, logits.shape[1])).round()
    written = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=processor.tokenizer.pad_token_id,
    )[:, inputs["input_ids"].shape[1] :]
    texts = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
    return logits[:, entries.astype(int)].tolist(), texts


def _watch(folder: str, way: str, device: str, seen: dict[str, Any]) -> None:
    options: dict[str, Any] = {"local_files_only": True}
    if way == "remote":
        options["trust_remote_code"] = True
    else:
        import eagle_moe  # noqa: F401 - registers its classes
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, **options)
    seen |= observe_processor(processor)
    with tempfile.TemporaryDirectory() as again:
        processor.save_pretrained(again)
        seen["again"] = observe_processor(AutoProcessor.from_pretrained(again, **options))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **options)
    seen |= observe_model(model.eval().to(device), processor)


def main(folder: str, way: str, device: str, out: str) -> None:
    seen: dict[str, Any] = {}
    try:
        _watch(folder, way, device, seen)
    except Exception as error:  # whatever a broken release brings about is what is looked for
        seen["error"] = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    Path(out).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
