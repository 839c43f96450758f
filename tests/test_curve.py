from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from tests.conftest import make_config, make_model
from train.curve import CurveWriter, SkillMetric, read_curve, score_batch
from train.data import ConversationDataset, DataSpec

MODEL = make_model(make_config())
TEXT = torch.randint(10, 200, (3, 9), generator=torch.Generator().manual_seed(0))


def by_hand(batch: dict[str, torch.Tensor], row: int) -> tuple[list[float], bool]:
    """Losses of the supervised tokens of one sample, and whether all are the likeliest."""
    logits = MODEL(batch["input_ids"][row : row + 1]).logits[0]
    losses, right = [], True
    for position, label in enumerate(batch["labels"][row].tolist()):
        if label != -100:
            losses.append(-torch.log_softmax(logits[position - 1], 0)[label].item())
            right &= logits[position - 1].argmax().item() == label
    return losses, right


def make_batch() -> dict[str, torch.Tensor]:
    """Different supervised positions per row; row 1 is answered as the model would."""
    labels = torch.full_like(TEXT, -100)
    labels[0, 4:6], labels[1, 6:8], labels[2, 8:] = TEXT[0, 4:6], TEXT[1, 6:8], TEXT[2, 8:]
    likeliest = MODEL(TEXT).logits.argmax(-1)
    labels[1, 6:8] = likeliest[1, 5:7]
    return {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": labels}


@torch.no_grad()
def test_scores_equal_those_of_each_sample_alone() -> None:
    batch = make_batch()
    loss, right = score_batch(MODEL, batch)
    alone = [by_hand(batch, row) for row in range(3)]
    assert right.tolist() == [int(each[1]) for each in alone] == [0, 1, 0]
    assert loss.item() == pytest.approx(np.mean([x for each in alone for x in each[0]]), rel=1e-4)


@torch.no_grad()
def test_one_wrong_token_makes_an_answer_wrong() -> None:
    batch = make_batch()
    batch["labels"][1, 7] = (batch["labels"][1, 7] + 1) % 200
    assert score_batch(MODEL, batch)[1].tolist() == [0, 0, 0]


@pytest.fixture
def dataset(tiny_processor: Any, tmp_path: Path) -> ConversationDataset:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    skills = ["text", "chart", "text", None]
    records = [
        {"id": str(i), "conversations": turns, **({"skill": skill} if skill else {})}
        for i, skill in enumerate(skills)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ConversationDataset(DataSpec(path=str(path)), tiny_processor, None)


def test_exact_match_is_counted_per_skill(dataset: ConversationDataset) -> None:
    metric = SkillMetric(dataset)
    assert metric.counts == {"total": 4, "text": 2, "chart": 1}
    right = np.array([1, 1, 0, 0])
    assert metric(EvalPrediction(predictions=right, label_ids=right)) == {
        "exact_match_total": 0.5,
        "exact_match_text": 0.5,
        "exact_match_chart": 1.0,
    }


def test_a_continued_curve_has_each_step_once(dataset: ConversationDataset, tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    writer = CurveWriter(path, SkillMetric(dataset))
    metrics = {f"eval_exact_match_{skill}": 0.25 for skill in ("total", "text", "chart")}

    def run(steps: tuple[int, ...], start: int = 0) -> None:
        began = SimpleNamespace(global_step=start, is_world_process_zero=True)
        writer.on_train_begin(None, began, None)
        for step in steps:
            state = SimpleNamespace(global_step=step, is_world_process_zero=True)
            writer.on_evaluate(None, state, None, metrics)

    run((2, 4))
    with path.open("a") as file:
        file.write('{"step": 6, "sk')  # killed while writing
    run((4, 6), start=2)
    rows = read_curve(path)
    assert [row["step"] for row in rows if row["skill"] == "text"] == [2, 4, 6]
    assert rows[0] == {"step": 2, "skill": "total", "exact_match": 0.25, "n": 4}


def test_the_last_step_is_always_evaluated(dataset: ConversationDataset, tmp_path: Path) -> None:
    writer = CurveWriter(tmp_path / "curve.jsonl", SkillMetric(dataset))
    for step, expected in ((2, False), (3, True)):
        control = SimpleNamespace(should_evaluate=False)
        writer.on_step_end(None, SimpleNamespace(global_step=step, max_steps=3), control)
        assert control.should_evaluate is expected
