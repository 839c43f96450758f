from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from eagle_moe.loss import IGNORE_INDEX
from eagle_moe.parts import model_tensors
from tests.ranks import on_ranks
from tests.tiny_trainer import START, Samples, collate, make_trainer
from train.engines import Engine, make_engine
from train.health import HEALTH, HealthLog, HealthRules
from train.moved import TrainingFault
from train.trainer import StageTrainer
from train.workspace import last_point

PARTS = ("connector", "language_model")
SKIP = HealthRules(on_nonfinite="skip", max_nonfinite=2)


def make(
    out: Path, rules: HealthRules | None = None, parts: tuple[str, ...] = PARTS, **args: Any
) -> StageTrainer:
    given = {"max_steps": 4, "warmup_steps": 0, **args}
    options = {"health": rules, "engine": make_engine("auto")}
    return make_trainer(out, parts, options=options, **given)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / HEALTH).read_text().splitlines()]


def poison_loss(
    trainer: StageTrainer, value: float = math.nan, steps: tuple[int, ...] = (1,)
) -> None:
    """Add `value` to the loss of these steps (0 = first). The gradients stay what they are."""
    trainer.model.lm_head.register_forward_hook(
        lambda module, args, out: out + value if trainer.state.global_step in steps else None
    )


def poison_gradient(trainer: StageTrainer, steps: tuple[int, ...] = (1,)) -> None:
    weight = next(trainer.model.model.multi_modal_projector.parameters())

    def poison(gradient: Tensor) -> Tensor:
        return gradient * math.nan if trainer.state.global_step in steps else gradient

    weight.register_hook(poison)


class Weights(TrainerCallback):
    """All weights after each step, by step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        tensors = model_tensors(model)
        self.after[state.global_step] = {name: value.clone() for name, value in tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_what_is_not_finite_stops_the_run_and_names_its_samples(
    tmp_path: Path, poison: Callable[[StageTrainer], None]
) -> None:
    trainer = make(tmp_path, gradient_accumulation_steps=2)
    poison(trainer)
    with pytest.raises(TrainingFault) as fault:
        trainer.train()
    (row,) = rows(tmp_path)
    what = "loss" if poison is poison_loss else "gradient norm"
    assert (row["step"], row["event"], row["action"]) == (2, f"the {what} is nan", "stopped")
    (process,) = row["processes"]
    assert process["rank"] == 0 and len(process["losses"]) == 2
    ids = [name for batch in process["sample_ids"] for name in batch]
    assert len(set(ids)) == 4 and all(name.startswith("sample-") for name in ids)
    assert f"step 2: the {what} is nan" in str(fault.value)
    assert all(name in str(fault.value) for name in (HEALTH, *ids))
    assert last_point(tmp_path) == tmp_path / "checkpoint-1"
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_samples_without_names_do_no_harm(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.data_collator = lambda samples: {
        key: value for key, value in collate(samples).items() if key != "sample_ids"
    }
    poison_loss(trainer)
    with pytest.raises(TrainingFault, match="step 2: the loss is nan"):
        trainer.train()
    assert rows(tmp_path)[0]["processes"][0]["sample_ids"] == [None]


def test_an_infinite_loss_with_finite_gradients_is_found(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    poison_loss(trainer, math.inf)
    with pytest.raises(TrainingFault, match="step 2: the loss is inf"):
        trainer.train()


def test_a_check_of_gradients_alone_would_miss_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(math, "nan", 1.0)  # the factor of a loss that is not finite
    trainer = make(tmp_path)
    poison_loss(trainer, math.inf)
    with pytest.raises(TrainingFault):
        trainer.train()
    assert math.isfinite(rows(tmp_path)[0]["gradient_norm"])


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_a_skipped_step_leaves_everything_alone_but_the_counter(
    tmp_path: Path, poison: Callable[[StageTrainer], None]
) -> None:
    trainer = make(tmp_path, SKIP, logging_steps=4, gradient_accumulation_steps=2)
    poison(trainer)
    weights, rates = Weights(), []
    trainer.add_callback(weights)
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (
        rates.append(trainer._get_learning_rate()) or step(*a, **k)
    )  # type: ignore[method-assign]
    trainer.train()
    assert same(weights.after[1], weights.after[2])
    assert not same(weights.after[2], weights.after[3])
    # linear decay: the second step's rate is used by the third
    assert rates[2] == rates[4] > rates[6]
    states = trainer.optimizer.optimizer.state.values()
    assert {int(state["step"]) for state in states} == {3}
    assert [row["action"] for row in rows(tmp_path)] == ["skipped"]
    logged = trainer.state.log_history[0]
    assert logged["steps_nonfinite"] == 1
    assert math.isfinite(logged["loss"])


def test_the_logged_loss_is_that_of_the_steps_that_were_taken(tmp_path: Path) -> None:
    each = make(tmp_path / "a", SKIP, parts=("connector",), learning_rate=0.0)
    poison_loss(each)
    each.train()
    losses = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
    assert math.isnan(losses[1])  # a line about a skipped step alone
    mean = make(tmp_path / "b", SKIP, parts=("connector",), learning_rate=0.0, logging_steps=4)
    poison_loss(mean)
    mean.train()
    expected = sum(losses[step] for step in (0, 2, 3)) / 3
    assert mean.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_without_the_skip_the_weights_are_lost(tmp_path: Path, monkeypatch: Any) -> None:
    """What the tests above would see."""
    monkeypatch.setattr(Engine, "leave_out", lambda *_: True)
    trainer = make(tmp_path, SKIP, max_steps=2)
    poison_gradient(trainer)
    trainer.train()
    assert not all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, SKIP, max_steps=6)
    poison_loss(trainer, steps=(1, 2, 4))
    with pytest.raises(TrainingFault, match=r"step 5: the loss is nan, and 2 steps were skipped"):
        trainer.train()
    assert [row["action"] for row in rows(tmp_path)] == ["skipped", "skipped", "stopped"]


def test_a_first_step_that_is_skipped_is_no_fault_of_its_parts(tmp_path: Path) -> None:
    trainer = make(tmp_path, SKIP)
    poison_loss(trainer, steps=(0,))
    trainer.train()
    assert trainer.health.counts["steps_nonfinite"] == 1
    assert not trainer.moved._pending  # judged by the second step


def test_counts_survive_in_resume_points(tmp_path: Path) -> None:
    first = make(tmp_path, SKIP, save_steps=3, max_steps=6, logging_steps=2)
    poison_loss(first, steps=(1, 3))

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    first.add_callback(Stop())
    first.train()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]
    second = make(tmp_path, SKIP, save_steps=3, max_steps=6, logging_steps=2)
    poison_loss(second, steps=(5,))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row["step"] for row in rows(tmp_path)] == [2, 6]  # step 4 went well this time
    assert second.state.log_history[-2]["steps_nonfinite"] == 2


class Unlabelled(Samples):
    """No sample teaches anything, save those with a number in `but`."""

    def __init__(self, but: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.but = but

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if index not in self.but:
            sample["labels"] = torch.full_like(sample["labels"], IGNORE_INDEX)
        return sample


def test_steps_without_a_label_are_counted_and_change_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    trainer.train_dataset = Unlabelled()
    trainer.train()
    assert [row["event"] for row in rows(tmp_path)] == [
        "no sample of it has a token to learn from"
    ] * 2
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(e["loss"], e["grad_norm"], e["steps_unlabelled"]) for e in logged] == [
        (0, 0, 1),
        (0, 0, 2),
    ]
    assert same(model_tensors(START), model_tensors(trainer.model))


def test_spikes_are_measured_by_the_running_median(tmp_path: Path) -> None:
    log = HealthLog(HealthRules(spike_factor=5), tmp_path / HEALTH)
    assert not log.spikes({"loss": 100.0})  # nothing to compare with
    for step in range(20):
        assert not log.spikes({"loss": 1.0 + step % 2, "gradient norm": 3.0})
    assert log.spikes({"loss": 4.9, "gradient norm": 3.0}) == []
    (found,) = log.spikes({"loss": 2.0, "gradient norm": 16.0})
    assert found == "the gradient norm is 16, 5.3 times the median"
    log.rules = HealthRules(spike_factor=None)
    assert not log.spikes({"loss": 1e9})


def test_a_spike_is_written_down_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, max_steps=18, save_steps=100)
    poison_loss(trainer, value=1e4, steps=(16,))
    trainer.train()
    (row,) = rows(tmp_path)
    assert (row["step"], row["action"]) == (17, "taken")
    assert row["event"].startswith("the loss is ") and row["processes"][0]["sample_ids"][0]
    assert "step 17: the loss is" in caplog.text
    assert trainer.state.log_history[-2]["steps_spiked"] == 1


def test_all_ranks_stop_or_skip_together(tmp_path: Path) -> None:
    def run(rank: int) -> Any:
        skipping = make(tmp_path / "skip", SKIP, max_steps=3, save_steps=100)
        if rank == 1:
            poison_loss(skipping)
        weights = Weights()
        skipping.add_callback(weights)
        skipping.train()
        assert same(weights.after[1], weights.after[2])
        stopping = make(tmp_path / "stop", max_steps=3, save_steps=100)
        if rank == 1:
            poison_loss(stopping)
        try:
            stopping.train()
        except TrainingFault as fault:
            return str(fault), skipping.health.counts["steps_nonfinite"]

    (one, skipped), (other, too) = on_ranks(run, tmp_path)
    assert one == other and "step 2: the loss is nan" in one
    assert skipped == too == 1
    for folder in ("skip", "stop"):
        (row,) = rows(tmp_path / folder)
        first, second = row["processes"]
        assert [first["rank"], second["rank"]] == [0, 1]
        assert math.isfinite(first["losses"][0])  # by its own loss it would have gone on alone
        assert second["losses"] == ["nan"]
        assert not set(first["sample_ids"][0]) & set(second["sample_ids"][0])


@pytest.mark.parametrize("averaged", [True, False])
def test_the_mean_is_that_of_all_ranks_whatever_their_labels(
    tmp_path: Path, averaged: bool
) -> None:
    """Two ranks with two samples each, one of which has no label, against one process.

    With `averaged` off, each rank takes the mean of its own labels: the mistake.
    """

    def run(rank: int) -> tuple[str, float, float]:
        engine = make_engine("auto")
        trainer = make(
            tmp_path / str(rank),
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4 // engine.processes,
            average_tokens_across_devices=averaged,
        )
        trainer.train_dataset = Unlabelled(but=labelled)
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
        return type(trainer.model_wrapped).__name__, entry["loss"], entry["grad_norm"]

    order = make(tmp_path / "order").order.order()[:4].tolist()
    labelled = (order[0], order[2], order[3])
    _, loss, norm = run(0)
    one, other = on_ranks(run, tmp_path)
    assert one == other
    assert one[0] == "DistributedDataParallel"
    equal = pytest.approx((loss, norm), rel=1e-5) == one[1:]
    assert equal == averaged
