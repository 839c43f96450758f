from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eagle_moe.parts import model_tensors, part_modules, part_of
from tests.tiny_trainer import START, Samples, changed, make_trainer
from train.health import HealthRules
from train.learning import learning_names, open_parts
from train.moved import MovedCheck, TrainingFault
from train.workspace import last_point


def test_what_learns_moves_and_nothing_else(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert {part_of(name) for name in changed(trainer.model)} == {"connector", "experts.clip"}
    assert changed(trainer.model) <= learning_names(trainer.model)


def test_the_mean_loss_at_the_end_is_that_of_the_steps_that_were_taken(tmp_path: Path) -> None:
    rules = HealthRules(on_nonfinite="skip")
    trainer = make_trainer(tmp_path, options={"health": rules}, max_steps=4, logging_steps=1)
    trainer.model.lm_head.register_forward_hook(
        lambda module, args, out: out * math.nan if trainer.state.global_step == 1 else None
    )
    trainer.train()
    *lines, last = trainer.state.log_history
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]
    assert last["train_loss"] == pytest.approx((losses[0] + losses[2] + losses[3]) / 3, rel=1e-6)


def test_each_part_has_its_own_rate(tmp_path: Path) -> None:
    rates = {"connector": 1e-3, "experts.clip": 1e-5}
    trainer = make_trainer(tmp_path, rates=rates, max_steps=1, warmup_steps=0)
    trainer.train()
    start = model_tensors(START)
    for part, rate in rates.items():
        # Adam's first step is the learning rate, whatever the gradient.
        steps = [
            (value - start[name]).abs().max().item()
            for name, value in model_tensors(trainer.model).items()
            if part_of(name) == part
        ]
        assert max(steps) == pytest.approx(rate, rel=0.1)
    logged = trainer.state.log_history[0]
    assert {part: logged[f"learning_rate_{part}"] for part in rates} == rates


def test_an_optimizer_that_groups_by_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    own = (torch.optim.SGD, {"params": []})
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda *_: own)
    with pytest.raises(ValueError, match="learning rate per part"):
        trainer.train()


def test_frozen_experts_keep_nothing_for_the_backward_pass() -> None:
    """No activations are saved below the connector, and dropout is off there."""
    model = copy.deepcopy(START).requires_grad_(False)
    open_parts(model, ["connector", "language_model"])
    saved: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    canvas = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        maps = model.model.vision_tower.encode(canvas)
        assert not saved
        assert model.model.vision_tower.fusion(maps).requires_grad
        assert saved


def test_frozen_parts_stay_in_evaluation_mode(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ("connector",), max_steps=1)
    seen = {}

    def note(module: nn.Module, *_: Any) -> None:
        seen[module] = module.training

    model = trainer.model
    for part in ("connector", "experts.clip", "experts.convnext", "language_model"):
        part_modules(model, part)[0].register_forward_hook(note)
    trainer.train()
    modes = {part: seen.get(part_modules(model, part)[0]) for part in ("connector", "experts.clip")}
    assert modes == {"connector": True, "experts.clip": False}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path, where: str) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    weight = next(p for p in trainer.model.model.multi_modal_projector.parameters())

    def poison(*_: Any) -> Tensor | None:
        if trainer.state.global_step != 2:
            return None
        return torch.full_like(weight, math.nan)

    if where == "gradient":
        weight.register_hook(lambda gradient: poison() if poison() is not None else gradient)
    else:
        head = trainer.model.lm_head
        head.register_forward_hook(
            lambda module, args, out: out * math.nan if trainer.state.global_step == 2 else None
        )
    with pytest.raises(TrainingFault, match="step 3: the (loss|gradient norm) is nan"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert last_point(tmp_path) == tmp_path / "checkpoint-2"


def test_evaluating_leaves_the_random_numbers_of_training_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, evaluation=Samples())
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_config_is_left_as_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert trainer.model.config.to_dict() == START.config.to_dict()
    assert isinstance(trainer.moved, MovedCheck)
