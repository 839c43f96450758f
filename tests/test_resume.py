from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from eagle_moe.checkpoint import SaveFailed, read_complete
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import model_tensors
from tests.tiny_trainer import START, Samples, make_trainer
from train.resume import LEARNING
from train.workspace import last_point


def test_resuming_equals_not_stopping(tmp_path: Path) -> None:
    def with_dropout() -> EagleMixForConditionalGeneration:
        model = copy.deepcopy(START)
        model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
        return model

    parts = ("experts.clip", "connector", "language_model")
    whole = make_trainer(tmp_path / "a", parts, with_dropout(), max_steps=4)
    whole.train()
    first = make_trainer(tmp_path / "b", parts, with_dropout(), max_steps=4, save_steps=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    first.add_callback(Stop())
    first.train()
    second = make_trainer(tmp_path / "b", parts, with_dropout(), max_steps=4, save_steps=2)
    point = last_point(tmp_path / "b")
    assert point is not None and point.name == "checkpoint-2"
    second.train(resume_from_checkpoint=str(point))
    one, other = model_tensors(whole.model), model_tensors(second.model)
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    assert [entry.get("loss") for entry in whole.state.log_history] == [
        entry.get("loss") for entry in second.state.log_history
    ]


def test_a_resume_point_holds_what_learns_and_no_more(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ("connector",))
    trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-3"]
    complete = read_complete(tmp_path / "checkpoint-3")
    assert complete is not None
    assert {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", LEARNING} <= set(
        complete.files
    )
    size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) * 4
    assert size < complete.files[LEARNING] < size + 2000


def test_a_resume_point_of_other_parts_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, ("connector",), max_steps=1).train()
    other = make_trainer(tmp_path, ("experts.clip",))
    with pytest.raises(ValueError, match="in which other tensors learned"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_full_disk_leaves_the_point_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    save = torch.save

    def fail(value: Any, path: Any) -> None:
        if trainer.state.global_step == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(value, path)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(SaveFailed, match="checkpoint-2: no room to save it"):
        trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert last_point(tmp_path) == tmp_path / "checkpoint-1"


def test_the_best_model_can_be_kept_and_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        evaluation=Samples(),
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
    )
    scores = {1: 0.1, 2: 0.9, 3: 0.5}
    trainer.compute_metrics = lambda _: {"score": scores[trainer.state.global_step]}
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept[state.global_step] = {
                name: value.clone() for name, value in model_tensors(trainer.model).items()
            }

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    now = model_tensors(trainer.model)
    assert not [name for name in now if not torch.equal(now[name], kept[2][name])]
