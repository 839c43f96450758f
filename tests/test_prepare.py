"""What a run trains with, and what is refused before it is put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from eagle_moe.parts import part_modules
from tests.tiny_run import make_world, recipe_in
from train.learning import learning_parts
from train.prepare import empty_model, prepare
from train.recipe import parse_recipe
from train.run import main
from train.sources import find_origins
from train.stages import stage_runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def test_a_model_is_open_where_its_stage_trains_it_and_nowhere_else(
    world: Path, tmp_path: Path
) -> None:
    told = {
        "trainable": ["connector"],
        "lora": {"language_model": {"r": 2}},
        "lr": {},
        "frozen_dtype": "bfloat16",
        "args": {"bf16": True, "use_cpu": True},
    }
    recipe = parse_recipe(recipe_in(world, tmp_path / "run", **told), "recipe")
    (run,) = stage_runs(recipe, "sft")
    prepared = prepare(run, find_origins(run))
    empty, adapters = empty_model(run)
    assert adapters is not None
    for model in (prepared.model, empty):
        assert learning_parts(model) == {"connector", "language_model"}
        for part in ("experts.clip", "connector", "language_model"):
            dtypes = {p.dtype for module in part_modules(model, part) for p in module.parameters()}
            assert dtypes == {torch.bfloat16 if part == "experts.clip" else torch.float32}
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert dict(empty.named_parameters()).keys() == dict(prepared.model.named_parameters()).keys()
    assert (len(prepared.dataset), prepared.held_out and len(prepared.held_out)) == (12, 6)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_what_would_learn_and_makes_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_in(world, tmp_path / "run"), sort_keys=False))
    assert main([str(path), "--dry-run", "stages.sft.lora={language_model: {}}",
                 "stages.sft.trainable=[connector]", "stages.sft.lr={}"]) == 0  # fmt: skip
    assert "(LoRA)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", "sftt"], 'Did you mean "sft"?'),
        (["--stage", "pre_align", "--expert", "clipp"], 'Did you mean "clip"?'),
        (["--expert", "clip"], "--stage"),
        (["stages.sft.args.max_step=3"], 'Did you mean "max_steps"?'),
        (["stages.sft.args.optim=adamm"], "stages.sft: args"),
        (["data.captions.path=nowhere.json"], "data.captions: no such file: nowhere.json"),
        (["stages.align.init_from=[runs/gone]"], "runs/gone does not exist"),
        (["--stage", "sft"], "Run the stage that makes it first"),
        (["init.experts={clip: random}"], "init.experts.convnext"),
        (["init.language_model=gone/for/good"], "init.language_model: no folder gone/for/good"),
        (["stages.align.batch_size=3", "stages.align.args.per_device_train_batch_size=2"],
         "not a multiple"),
    ],
)  # fmt: skip
def test_errors_come_before_anything_is_spent(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_in(world, tmp_path / "run"), sort_keys=False))
    assert main([str(path), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
