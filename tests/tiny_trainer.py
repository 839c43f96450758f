"""A trainer of a tiny model on a dozen samples, for tests of what happens in a run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from eagle_moe.checkpoint import Complete
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import model_tensors
from tests.conftest import make_config, make_model
from train.learning import open_parts
from train.trainer import StageTrainer

TOKENS = 4  # per image
MARK = Complete(stage="s", identity={})
START = make_model(make_config(grid=2))


class Samples(Dataset[dict[str, Any]]):
    """One image (or none) and five tokens each."""

    def __init__(self, images: int = 1) -> None:
        self.images = images

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(10, 200, (5,), generator=generator)
        ids = torch.cat([torch.full((TOKENS * self.images,), 3), text])
        labels = torch.where(ids == 3, -100, ids)
        size = (self.images, 3, 64, 64)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        sample = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
        return {**sample, "id": f"sample-{index}"}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for key in ("input_ids", "labels"):
        batch[key] = torch.stack([sample[key] for sample in samples])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["sample_ids"] = [sample["id"] for sample in samples]
    pixels = torch.cat([sample["pixel_values"] for sample in samples])
    return {**batch, "pixel_values": pixels} if len(pixels) else batch


def make_trainer(
    out: Path,
    parts: tuple[str, ...] = ("connector", "experts.clip"),
    model: EagleMixForConditionalGeneration | None = None,
    images: int = 1,
    rates: dict[str, float] | None = None,
    evaluation: Samples | None = None,
    options: Mapping[str, Any] | None = None,
    **args: Any,
) -> StageTrainer:
    model = copy.deepcopy(START) if model is None else model
    model.requires_grad_(False)
    open_parts(model, parts)
    given = {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    return StageTrainer(
        rates or dict.fromkeys(parts, 1e-3),
        MARK,
        model=model,
        train_dataset=Samples(images),
        eval_dataset=evaluation,
        data_collator=collate,
        **(options or {}),
        args=TrainingArguments(
            str(out),
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
            data_seed=0,
            save_total_limit=1,
            **{**given, **args},
        ),
    )


def changed(model: nn.Module) -> set[str]:
    start, now = model_tensors(START), model_tensors(model)
    return {name for name in start if not torch.equal(start[name], now[name])}
