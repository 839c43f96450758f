from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eagle_moe.build import build_config, build_model
from eagle_moe.parts import all_parts, part_of
from tests.tiny_run import make_world
from train.recipe import load_recipe, parse_recipe
from train.stages import stage_runs

REPOSITORY = Path(__file__).parents[1]
FULL_SIZE = sorted((REPOSITORY / "configs" / "recipes").glob("eagle-*.yaml"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_recipe_survives_its_own_dump(recipe: dict[str, Any]) -> None:
    parsed = parse_recipe(recipe, "recipe")
    assert (
        parse_recipe(yaml.safe_load(yaml.safe_dump(parsed.dump(), sort_keys=False)), "x") == parsed
    )
    assert list(parsed.stages) == ["pre_align", "align", "sft"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sede=1", 'Did you mean "seed"?'),
        ("stages.sftt.max_length=3", 'Did you mean "sft"?'),
        ("data.caption.limit=3", 'Did you mean "captions"?'),
        ("stages.sft.trainable=[expert]", 'Did you mean "experts"?'),
        ("stages.sft.trainable=[experts.clipp]", 'Did you mean "experts.clip"?'),
        ("stages.sft.lr={conector: 1e-3}", 'Did you mean "connector"?'),
        ("stages.sft.lora={languagemodel: {r: 4}}", 'Did you mean "language_model"?'),
        ("stages.sft.lora={language_model: {rank: 4}}", "unknown key"),
        ("stages.sft.data=[question]", 'Did you mean "questions"?'),
        ("stages.sft.eval.data=tests", 'Did you mean "test"?'),
        ("stages.sft.init_from=[aling]", 'Did you mean "align"?'),
        ("stages.align.init_from=[sft]", "no earlier stage"),
        ("stages.sft.args.lerning_rate=1", 'Did you mean "learning_rate"?'),
        ("stages.sft.args.evaluation_strategy=steps", "Valid:"),
        ("stages.sft.args.seed=1", "`seed` of the recipe"),
        ("stages.sft.template=vicunna", 'Did you mean "vicuna"?'),
        ("model.experts=[clipp]", "clip"),
        ("model.fusion.kind=channel", "channel_concat"),
        ("init.experts={clipp: random}", 'Did you mean "clip"?'),
        ("stages.sft.batch_size=0", "batch_size"),
        ("frozen_dtype=bfloat16", "needs args.bf16"),
    ],
)
def test_a_typo_names_the_nearest_valid_name(
    recipe: dict[str, Any], override: str, said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        parse_recipe(recipe, "my.yaml", [override])
    assert said in str(caught.value)
    assert "my.yaml" in str(caught.value) or override in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.sft.trainable=[]"], "nothing learns"),
        (["stages.sft.lora={language_model: {}}"], "both in `trainable` and in `lora`"),
        (["stages.align.lr={experts: 1e-3}"], "do not learn"),
        (["stages.pre_align.trainable=[language_model]", "stages.pre_align.lr={}"], "per_expert"),
        (["stages.sft.cache_features=true"], "needs frozen experts"),
        (["stages.sft.init_from="], "say where its weights come from"),
        (["stages.sft.args.gradient_accumulation_steps=2"], "not both"),
        (["stages.sft.args.label_smoothing_factor=0.1"], "not shifted"),
    ],
)
def test_what_makes_no_sense_is_refused(
    recipe: dict[str, Any], overrides: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        parse_recipe(recipe, "recipe", overrides)


def test_a_model_may_be_a_file_with_changes(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(recipe["model"]))
    path = tmp_path / "recipe.yaml"

    path.write_text(yaml.safe_dump({**recipe, "model": "model.yaml"}, sort_keys=False))
    assert load_recipe(path) == parse_recipe(recipe, "recipe")
    changed = load_recipe(path, ["model.fusion.grid=4"])
    assert changed.model.fusion == {**recipe["model"]["fusion"], "grid": 4}

    only_clip = {"base": "model.yaml", "experts": [recipe["model"]["experts"][0]]}
    init = {"experts": {"clip": recipe["init"]["experts"]["clip"]}}
    path.write_text(yaml.safe_dump({**recipe, "model": only_clip, "init": init}, sort_keys=False))
    assert load_recipe(path).experts == ("clip",)
    with pytest.raises(FileNotFoundError, match="gone.yaml"):
        load_recipe(path, ["model=gone.yaml"])


def test_overrides_reach_everything(recipe: dict[str, Any]) -> None:
    parsed = parse_recipe(
        recipe, "recipe", ["stages.sft.args.max_steps=10", "seed=7", "data.test.limit=2"]
    )
    assert parsed.stages["sft"].args["max_steps"] == 10
    assert (parsed.seed, parsed.data["test"].limit) == (7, 2)


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_full_size_recipes_resolve_on_meta(path: Path) -> None:
    recipe = load_recipe(path)
    assert list(recipe.stages) == ["pre_align", "align", "sft"]
    with torch.device("meta"):
        model = build_model(build_config(recipe.model, image_token_id=128_256))
    held = {part_of(name) for name, _ in model.named_parameters()}
    assert held == set(all_parts(recipe.experts))
    assert [run.expert for run in stage_runs(recipe, "pre_align")] == list(recipe.experts)
    for name in recipe.stages:
        for run in stage_runs(recipe, name):
            assert set(run.rates(1.0)) == set(run.trainable) <= held


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_full_size_recipes_have_the_published_hyper_parameters(path: Path) -> None:
    """NVlabs/EAGLE scripts: 1 epoch, cosine; captions 256 at 1e-3, fine-tuning 128 at 2e-5."""
    recipe = load_recipe(path)
    for name, batch, micro, rate in (("align", 256, 8, 1e-3), ("sft", 128, 4, 2e-5)):
        stage = recipe.stages[name]
        assert (stage.batch_size, stage.args["per_device_train_batch_size"]) == (batch, micro)
        assert (stage.args["learning_rate"], stage.max_length) == (rate, 2048)
        assert (stage.args["num_train_epochs"], stage.args["warmup_steps"]) == (1, 0.03)
        assert (stage.args["lr_scheduler_type"], stage.args["weight_decay"]) == ("cosine", 0.0)
    assert recipe.stages["align"].template == "plain"
    assert set(recipe.stages["sft"].trainable) == {"experts", "connector", "language_model"}


def test_a_recipe_may_build_on_another(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    changes = {"base": "base.yaml", "name": "other", "stages": {"sft": {"eval": None}}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changes))
    other = load_recipe(tmp_path / "other.yaml")
    assert (other.name, other.stages["sft"].eval) == ("other", None)
    assert other.stages["align"] == parse_recipe(recipe, "recipe").stages["align"]
