from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from eagle_moe.build import load_model
from eagle_moe.parts import model_tensors
from tests.engine_runs import kill_at, make_mixed_world, mixed_recipe, run_on_two
from tests.tiny_run import make_world
from tests.tiny_trainer import Samples, make_trainer
from train.learning import learning_names
from train.recipe import Ema, parse_recipe
from train.run import run_recipe
from train.trainer import StageTrainer

RULE = Ema(decay=0.6)


class Watch(TrainerCallback):
    """The weights that learn, before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def _look(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        learning = learning_names(model)
        tensors = model_tensors(model)
        self.seen.append({name: tensors[name].detach().clone() for name in sorted(learning)})

    on_train_begin = on_step_end = _look


def train(folder: Path, rule: Ema | None, **options: Any) -> tuple[StageTrainer, Watch]:
    trainer = make_trainer(folder, options={"ema": rule}, **{"max_steps": 6, **options})
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


def average_of(seen: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Written out: the weight of each step's tensors, in float64."""
    shares = [1.0]
    for step in range(1, len(seen)):
        kept = min(decay, (1 + step) / (10 + step))
        shares = [share * kept for share in shares] + [1 - kept]
    return {
        name: sum(share * at[name].double() for share, at in zip(shares, seen, strict=True))
        for name in seen[0]
    }


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_it_is_the_average_that_the_formula_says(tmp_path: Path, decay: float) -> None:
    trainer, watch = train(tmp_path, Ema(decay=decay))
    assert trainer.ema is not None
    wanted = average_of(watch.seen, decay)
    assert trainer.ema.values.keys() == wanted.keys()
    for name, value in trainer.ema.values.items():
        torch.testing.assert_close(value.double(), wanted[name], atol=1e-6, rtol=1e-6)
    plain = average_of(watch.seen, 0.0)
    assert any((wanted[name] - plain[name]).abs().max() > 1e-5 for name in wanted)


@pytest.mark.parametrize("memory", ["device", "host"])
def test_it_leaves_training_alone(tmp_path: Path, memory: Any) -> None:
    evaluation = {"evaluation": Samples(), "eval_strategy": "steps", "eval_steps": 2}
    _, without = train(tmp_path / "a", None, **evaluation)
    _, beside = train(tmp_path / "b", Ema(decay=0.6, memory=memory), **evaluation)
    for plain, other in zip(without.seen, beside.seen, strict=True):
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_run_that_goes_on_has_the_same_average_bit_for_bit(tmp_path: Path) -> None:
    options = {"options": {"ema": RULE}, "lr_scheduler_type": "constant"}
    make_trainer(tmp_path / "cut", max_steps=3, **options).train()
    point = str(tmp_path / "cut" / "checkpoint-3")
    whole, rest, anew = (
        make_trainer(tmp_path / name, max_steps=6, **options) for name in ("whole", "rest", "anew")
    )
    assert whole.ema and rest.ema and anew.ema
    whole.train()
    rest.train(resume_from_checkpoint=point)
    assert all(torch.equal(v, rest.ema.values[n]) for n, v in whole.ema.values.items())
    # Had it begun again with the weights of step 3, it would be another one.
    anew.ema.load = lambda folder: None  # type: ignore[method-assign]
    anew.train(resume_from_checkpoint=point)
    assert not all(torch.equal(v, anew.ema.values[n]) for n, v in whole.ema.values.items())


def test_the_model_has_the_average_in_the_block_and_its_own_weights_after_it(
    tmp_path: Path,
) -> None:
    trainer, watch = train(tmp_path, RULE)
    assert trainer.ema is not None
    tensors = model_tensors(trainer.model)
    with trainer.ema.in_place():
        assert all(torch.equal(tensors[n], value) for n, value in trainer.ema.values.items())
    assert all(torch.equal(tensors[name], value) for name, value in watch.seen[-1].items())


def test_a_stage_ends_in_the_average(tmp_path: Path) -> None:
    recipe = make_world(tmp_path)
    align = recipe["stages"]["align"]
    recipe["stages"] = {"align": {**align, "init_from": [], "ema": 0.5}}
    kept: list[dict[str, Tensor]] = []
    save = StageTrainer.train

    def spy(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        done = save(self, *args, **kwargs)
        assert self.ema is not None
        kept.append({name: value.clone() for name, value in self.ema.values.items()})
        kept.append({n: model_tensors(self.model)[n].detach().clone() for n in kept[0]})
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "train", spy)
        saved = model_tensors(load_model(run_recipe(recipe)))
    averaged, last = kept
    assert all(torch.equal(saved[name], value) for name, value in averaged.items())
    assert not all(torch.equal(saved[name], value) for name, value in last.items())


def test_pieces_average_to_what_whole_tensors_do_also_after_a_kill(tmp_path: Path) -> None:
    make_mixed_world(tmp_path)

    def run(name: str, engine: str, *before: Any) -> list[int]:
        recipe = mixed_recipe(tmp_path, tmp_path / name, engine, ema=0.5)
        return [code for code, _ in run_on_two(recipe, tmp_path / f"{name}-seen", *before)]

    assert run("whole", "ddp") == [0, 0]
    assert -9 in run("pieces", "fsdp2", kill_at(2))
    assert run("pieces", "fsdp2") == [0, 0]
    whole, pieces = (
        load_file(tmp_path / name / "sft" / "model.safetensors") for name in ("whole", "pieces")
    )
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, atol=1e-5, rtol=0)


def test_an_average_that_cannot_be_put_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    recipe = {**make_world(tmp_path), "engine": "zero3"}
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="ema: .*engine: zero3. Choose engine: zero2 or fsdp2"):
        run_recipe(recipe, ["stages.pre_align.ema=0.9"])


def test_a_number_is_its_decay(tmp_path: Path) -> None:
    recipe = make_world(tmp_path)
    assert parse_recipe(recipe, "r").stages["sft"].ema is None
    assert parse_recipe(recipe, "r", ["stages.sft.ema=0.99"]).stages["sft"].ema == Ema(decay=0.99)
    given = parse_recipe(recipe, "r", ["stages.sft.ema={decay: 0.9, memory: host}"])
    assert given.stages["sft"].ema == Ema(decay=0.9, memory="host")
    assert parse_recipe(given.dump(), "r") == given
    with pytest.raises(ValueError, match="ema"):
        parse_recipe(recipe, "r", ["stages.sft.ema=1"])
