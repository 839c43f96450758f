from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, make_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from eagle_moe.checkpoint import Complete, SaveFailed, read_complete
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import model_tensors, part_modules, part_of
from train.learning import learning_names, open_parts
from train.moved import MovedCheck, TrainingFault
from train.resume import LEARNING
from train.trainer import StageTrainer
from train.workspace import last_point

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


def test_what_learns_moves_and_nothing_else(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert {part_of(name) for name in changed(trainer.model)} == {"connector", "experts.clip"}
    assert changed(trainer.model) <= learning_names(trainer.model)


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


def test_evaluating_leaves_the_random_numbers_of_training_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, evaluation=Samples())
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_config_is_left_as_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert trainer.model.config.to_dict() == START.config.to_dict()
    assert isinstance(trainer.moved, MovedCheck)
