from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from eagle_moe.parts import part_of
from tests.tiny_trainer import START, changed, make_trainer
from train.moved import TrainingFault


def test_a_part_behind_no_grad_is_found(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    expert = trainer.model.model.vision_tower.towers["clip"]
    forward = expert.forward
    expert.forward = lambda view: forward(view).detach()
    with pytest.raises(TrainingFault, match="got no gradient: model.vision_tower.towers.clip"):
        trainer.train()


def test_a_frozen_part_that_moves_is_found(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    weight = trainer.model.lm_head.weight

    class Meddler(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            weight.data[0, 0] += 1

    trainer.callback_handler.callbacks.insert(0, Meddler())
    with pytest.raises(TrainingFault, match="frozen, but moved: lm_head.weight"):
        trainer.train()


def test_a_parameter_that_is_not_in_the_optimizer_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    create = trainer.create_optimizer

    def forget(model: Any = None) -> Any:
        optimizer = create(model)
        optimizer.param_groups[0]["params"].pop()
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", forget)
    with pytest.raises(TrainingFault, match="trainable, but not in the optimizer"):
        trainer.train()


def test_a_step_too_small_for_the_dtype_is_found(tmp_path: Path) -> None:
    model = copy.deepcopy(START).to(torch.bfloat16)
    rates = {"language_model": 1e-12}
    with pytest.raises(TrainingFault, match="language_model: trainable, but nothing in it moved"):
        make_trainer(tmp_path, ("language_model",), model, rates=rates).train()


def test_warm_up_from_zero_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, warmup_steps=2)
    trainer.train()  # the first step has rate 0
    assert changed(trainer.model)


def test_vision_is_judged_by_steps_with_images_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = ("experts.clip", "connector", "language_model")
    trainer = make_trainer(tmp_path, parts, images=0)
    trainer.train()
    assert {part_of(name) for name in changed(trainer.model)} == {"language_model"}
    assert "connector, experts.clip: trainable, but no batch had an image" in caplog.text


def test_the_check_at_the_end_sees_the_whole_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.moved.check_frozen(trainer.model)
    trainer.model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(TrainingFault, match="lm_head.weight"):
        trainer.moved.check_frozen(trainer.model)
