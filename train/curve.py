"""Learning curves: exact match per skill, teacher-forced, on held-out records while training.

Under greedy decoding an answer is right if and only if, given the right answer so far, every next
token is right; so one forward pass replaces generation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

from eagle_moe.checkpoint import replace_text
from eagle_moe.loss import IGNORE_INDEX
from train.data import ConversationDataset

CURVE = "curve.jsonl"
TOTAL = "total"


def score_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss (), and whether each sample's supervised tokens are all predicted (B,) int64.

    Without a supervised token the loss is 0. Logits are computed only at positions where some
    sample has one.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    targets = targets[:, columns]
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = total / (targets != IGNORE_INDEX).sum().clamp(min=1)
    right = (logits.argmax(-1) == targets) | (targets == IGNORE_INDEX)
    return loss, right.all(1).long()


class SkillMetric:
    """`compute_metrics` of the trainer: exact match in total and per `skill` of the records."""

    def __init__(self, dataset: ConversationDataset) -> None:
        records = (dataset.record(index) for index in range(len(dataset)))
        self.skills = np.array([str(record.extra.get("skill", "")) for record in records])

    @property
    def counts(self) -> dict[str, int]:
        """Samples in total and per skill."""
        return {TOTAL: len(self.skills), **Counter(filter(None, self.skills.tolist()))}

    def __call__(self, predicted: EvalPrediction) -> dict[str, float]:
        right = np.asarray(predicted.predictions)
        assert len(right) == len(self.skills)
        return {
            f"exact_match_{skill}": float(right[(self.skills == skill) | (skill == TOTAL)].mean())
            for skill in self.counts
        }


class CurveWriter(TrainerCallback):
    """Appends `{"step", "skill", "exact_match", "n"}` for each skill to `curve.jsonl`."""

    def __init__(self, path: Path, metric: SkillMetric) -> None:
        self.path = path
        self.metric = metric

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what a killed process wrote after the step from which this one continues."""
        if not state.is_world_process_zero:
            return
        rows = read_curve(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= state.global_step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # a curve without its last point misleads

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for skill, count in self.metric.counts.items():
                match = round(metrics[f"eval_exact_match_{skill}"], 6)
                row = {"step": state.global_step, "skill": skill, "exact_match": match, "n": count}
                file.write(json.dumps(row) + "\n")


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Rows of a `curve.jsonl`; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
