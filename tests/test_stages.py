from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import make_world
from train.recipe import Recipe, parse_recipe
from train.stages import stage_runs


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return make_world(tmp_path)


@pytest.fixture
def recipe(data: dict[str, Any]) -> Recipe:
    return parse_recipe(data, "recipe")


def test_a_stage_fans_out_over_the_experts(recipe: Recipe) -> None:
    runs = stage_runs(recipe, "pre_align")
    assert [run.title for run in runs] == ["pre_align/clip", "pre_align/convnext"]
    clip = runs[0]
    assert clip.parts == ("experts.clip", "connector", "language_model")
    assert clip.trainable == ("experts.clip", "connector")
    assert len(clip.model_spec.experts) == 1
    assert clip.folder == Path(recipe.output_dir, "pre_align", "clip")
    assert clip.workspace == Path(recipe.output_dir, "unfinished", "pre_align", "clip")


def test_an_expert_that_stays_closed_has_no_run(data: dict[str, Any]) -> None:
    told = ["stages.pre_align.trainable=[experts.convnext]", "stages.pre_align.lr={}"]
    runs = stage_runs(parse_recipe(data, "recipe", told), "pre_align")
    assert [run.expert for run in runs] == ["convnext"]


def test_a_stage_for_all_is_one_run_with_its_own_template(recipe: Recipe) -> None:
    (run,) = stage_runs(recipe, "align")
    assert (run.title, run.experts) == ("align", ("clip", "convnext"))
    assert (run.model_spec.template, recipe.model.template) == ("plain", "short")


def test_rates_are_of_the_narrowest_part_that_is_named(recipe: Recipe) -> None:
    (run,) = stage_runs(recipe, "sft")
    assert run.rates(1e-3) == {
        "experts.clip": 1e-5,
        "experts.convnext": 1e-3,
        "connector": 1e-3,
        "language_model": 1e-3,
    }


def test_the_dtype_of_a_stage_overrides_the_recipes(data: dict[str, Any]) -> None:
    told = ["stages.sft.dtype=bfloat16", "stages.align.args.bf16=true",
            "stages.align.frozen_dtype=bfloat16"]  # fmt: skip
    recipe = parse_recipe(data, "recipe", told)
    (sft,), (align,) = stage_runs(recipe, "sft"), stage_runs(recipe, "align")
    assert (sft.dtype, sft.frozen_dtype) == ("bfloat16", "bfloat16")
    assert (align.dtype, align.frozen_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("stage", "expert", "said"),
    [
        ("aling", None, 'Did you mean "align"?'),
        ("pre_align", "clap", 'Did you mean "clip"?'),
        ("sft", "clip", "not `per_expert`"),
    ],
)
def test_unknown_names_are_explained(
    recipe: Recipe, stage: str, expert: str | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        stage_runs(recipe, stage, expert)
