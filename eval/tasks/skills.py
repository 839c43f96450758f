"""The built-in suite as a task of lmms-eval (`skills.yaml`), read by `eval.items`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from eagle_moe.canvas import load_image
from eagle_moe.scores.score import is_correct
from eval.items import Item, hash_items, read_items

MAX_NEW_TOKENS = 16
"""Cap of an answer unless a run says otherwise; the suite's answers are short."""


class SkillsTask(ConfigurableMessagesTask):
    """`dataset_path` is the folder of a suite, or a file like its `test.jsonl`.

    `dataset_kwargs`: `limit` asks only that many questions, taken from the skills in turn.
    """

    items: list[Item]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the suite instead: nothing is fetched, copied or cached."""
        self.items = read_items(self.config.dataset_path, (dataset_kwargs or {}).get("limit"))
        rows = [
            {
                "id": item.id,
                "skill": item.skill,
                "kind": item.kind,
                "question": item.question,
                "answer": item.answer,
                "image": str(item.image) if item.image else None,
            }
            for item in self.items
        ]
        self.dataset = self.dataset_no_image = DatasetDict({"test": Dataset.from_list(rows)})

    def data_sha256(self) -> str:
        return hash_items(self.items)

    def made(self) -> dict[str, Any]:
        """What the suite says of itself: `version` and `seed`, if it does."""
        data = Path(self.config.dataset_path)
        path = (data if data.is_dir() else data.parent) / "suite.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def image_of(row: dict[str, Any]) -> list[Image.Image]:
    return [load_image(row["image"])] if row["image"] else []


def score(row: dict[str, Any], predictions: list[str]) -> dict[str, float]:
    return {"accuracy": float(is_correct(predictions[0], row["answer"]))}
