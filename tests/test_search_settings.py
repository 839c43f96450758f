"""Search files: what may be said, and what a slip is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.recipe import load_recipe
from train.search.halving import Halving
from train.search.inputs import resolve
from train.search.rules import NoiseAware, Plain
from train.search.settings import SearchSettings, load_settings
from train.search.strategies import Greedy, Random

SMOKE = Path(__file__).parent.parent / "configs/search/smoke.yaml"


def parse(**fields: object) -> SearchSettings:
    needed = {"name": "x", "recipe": "configs/recipes/mini.yaml", "evaluation": {"data": "d"}}
    return SearchSettings.parse(needed | fields, "search.yaml")


def test_kinds_take_their_own_options():
    assert parse(strategy="greedy", rule="plain").make_strategy() == Greedy()
    told = parse(
        strategy={"kind": "random", "count": 3, "seed": 1},
        rule={"kind": "noise_aware", "level": 0.9},
        halving={"budgets": [0.1, 0.5], "keep": 0.5},
    )
    assert told.make_strategy() == Random(count=3, seed=1)
    assert told.make_rule() == NoiseAware(level=0.9)
    assert told.make_halving() == Halving(budgets=(0.1, 0.5), keep=0.5)
    assert isinstance(parse(rule="plain").make_rule(), Plain)


def test_overrides_reach_into_sections():
    settings = load_settings(SMOKE, ["rule.kind=noise_aware", "rule.level=0.95", "seeds=[0,1]"])
    assert settings.make_rule() == NoiseAware(level=0.95)
    assert settings.seeds == [0, 1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategie": "greedy"}, r'unknown key `strategie`. Did you mean "strategy"'),
        ({"strategy": "gredy"}, r'strategy.kind: "gredy". Did you mean "greedy"'),
        ({"strategy": {"kind": "random"}}, r"`strategy.count`"),
        ({"strategy": {"kind": "greedy", "count": 3}}, r"strategy: unknown key `count`"),
        ({"rule": {"kind": "noise_aware", "levle": 0.9}}, r'`levle`. Did you mean "level"'),
        ({"rule": {"kind": "noise_aware", "level": "high"}}, r"`rule.level`"),
        ({"rule": {"level": 0.9}}, r'rule.kind: "None"'),
        ({"halving": {"keeps": 0.5}}, r'halving: unknown key `keeps`. Did you mean "keep"'),
        ({"seeds": [1, 1]}, "a seed is named twice"),
        ({"seeds": []}, "seeds"),
        ({"evaluation": {}}, "`evaluation.data`: say on which questions"),
        ({"executor": {"kind": "local", "address": "here"}}, "`address` is of kind: ray"),
        ({"gpus_per_trial": -1}, "gpus_per_trial"),
    ],
)
def test_a_slip_is_named(fields, said):
    with pytest.raises(ValueError, match=f"(?s)search.yaml.*{said}"):
        parse(**fields)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pool=[clip, clip]"], r'pool: "clip" is named twice'),
        (["pool=[clip, smm]"], r'pool: "smm" is not an expert of .*Did you mean "sam"'),
        (["pool=[convnext, sam]"], r'base: "clip" is not in the pool'),
        (["overrides=[stages.sfft.args.max_steps=1]"], r'no `sfft`. Did you mean "sft"'),
        (["recipe=configs/recipes/nothing.yaml"], r"nothing.yaml: no such file"),
        (
            ["overrides=['model.experts.3={name: eva02, kind: timm:no_such_model}']"],
            r"no_such_model",
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_spent(overrides, said):
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){said}"):
        resolve(load_settings(SMOKE, overrides))


def test_an_expert_that_cannot_be_built_is_named():
    broken = "overrides=['model.experts.2={name: sam, preset: sam-tiny, arch: {heads: 5}}']"
    with pytest.raises(ValueError, match=r"pool: `sam` cannot be built: .*arch.heads 5"):
        resolve(load_settings(SMOKE, [broken]))


def test_the_pool_is_the_recipes_unless_it_is_said():
    whole = resolve(load_settings(SMOKE, ["pool=[]"]))
    assert whole.pool.names == load_recipe("configs/recipes/mini.yaml").experts
    few = resolve(load_settings(SMOKE, ["pool=[sam, clip]"]))
    assert few.pool.names == few.recipe.experts == ("sam", "clip")


def test_the_material_says_where_a_recipe_starts():
    inputs = resolve(load_settings(SMOKE, ["material.root=elsewhere"]))
    assert {job.name for job in inputs.material} >= {"suite", "text", "reader", "eyes/clip"}
    assert inputs.settings.evaluation.data == "elsewhere/suite"
    assert inputs.recipe.init.experts["sam"] == "elsewhere/experts/sam"
    assert inputs.recipe.data["questions"].path == "elsewhere/suite/train.jsonl"
