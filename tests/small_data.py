"""Four records with their pictures on disk, and the settings of a dataset that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from train.data import DataSpec

SIZE = 64  # of the canvas of `tiny_processor`


def make_data(folder: Path, make_image: Callable[..., Image.Image]) -> Path:
    """Four records: one image, two images, text only, one image; and `images/0..3.png`."""
    (folder / "images").mkdir()
    for number in range(4):
        make_image(40 + number, 30, seed=number).save(folder / f"images/{number}.png")
    rows = [
        ("a", ["images/0.png"], "<image>\nwhat", "cat", {"skill": "ocr"}),
        ("b", ["images/2.png", "images/1.png"], "<image>\n<image>\nwhat", "dog", {}),
        ("c", [], "why", "because", {}),
        ("d", ["images/3.png"], "<image>\nwho", "me", {}),
    ]
    lines = [
        json.dumps(
            {
                "id": name,
                "image": images,
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": answer},
                ],
                **extra,
            }
        )
        for name, images, question, answer, extra in rows
    ]
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def spec(path: Path, **fields: Any) -> DataSpec:
    return DataSpec(path=str(path), **fields)
