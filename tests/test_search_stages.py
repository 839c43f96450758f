"""Trials as jobs: what they share, what sets them apart, and that their recipes are sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.suites import write_suite
from tests.tiny_run import make_world
from train.jobs.graph import fingerprints
from train.recipe import Recipe, parse_recipe
from train.search.mixtures import recipe_of, seeded
from train.search.settings import EvaluationSettings
from train.search.stages import Plan, Planner
from train.search.trial import Trial

POOL = ("clip", "convnext", "sam")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    data = make_world(folder, POOL)
    write_suite(folder / "suite")
    return data


@pytest.fixture
def recipe(world) -> Recipe:
    return parse_recipe(world, "recipe")


def planner(recipe: Recipe, folder: Path, code: str = "1", **options: Any) -> Planner:
    suite = Path(recipe.data["test"].path).parent / "suite"
    evaluation = EvaluationSettings(data=str(suite), limit=options.pop("limit", None))
    return Planner(recipe, evaluation, folder / "out", folder / "store", code, **options)


def keys(plan: Plan) -> dict[str, str]:
    return {stage.title: stage.key for stage in plan.stages} | {"score": plan.key}


def changed(first: Plan, second: Plan) -> set[str]:
    one, two = keys(first), keys(second)
    assert one.keys() == two.keys()
    return {title for title in one if one[title] != two[title]}


def test_a_trial_is_a_graph_that_can_run(recipe, tmp_path):
    plan = planner(recipe, tmp_path).plan(Trial(("clip", "sam")))
    assert fingerprints(plan.jobs)
    assert [stage.title for stage in plan.stages] == [
        "pre_align/clip",
        "pre_align/sam",
        "align",
        "sft",
    ]
    names = {job.name: set(job.needs) for job in plan.jobs}
    assert names["align clip+sam seed 0"] == {"pre_align/clip", "pre_align/sam"}
    assert names["score clip+sam seed 0"] == {"sft clip+sam seed 0"}
    for stage in plan.stages:
        one = parse_recipe(stage.job.kwargs["recipe"], stage.title)
        assert list(one.stages) == [stage.run.name]


def test_stages_take_their_weights_from_the_folders_of_those_before(recipe, tmp_path):
    plan = planner(recipe, tmp_path).plan(Trial(("clip", "sam")))
    clip, sam, align, sft = plan.stages
    sources = align.job.kwargs["recipe"]["stages"]["align"]["init_from"]
    assert sources == [
        {"checkpoint": str(clip.checkpoint), "parts": ["experts.clip"]},
        {"checkpoint": str(sam.checkpoint), "parts": ["experts.sam"]},
    ]
    (source,) = sft.job.kwargs["recipe"]["stages"]["sft"]["init_from"]
    assert source["checkpoint"] == str(align.checkpoint)
    assert plan.score.kwargs["model"] == str(sft.checkpoint)


def test_mixtures_share_experts_and_nothing_else(recipe, tmp_path):
    made = planner(recipe, tmp_path)
    one, two = made.plan(Trial(("clip", "sam"))), made.plan(Trial(("clip", "convnext")))
    assert keys(one)["pre_align/clip"] == keys(two)["pre_align/clip"]
    directories = [job.directory for plan in (one, two) for job in plan.jobs]
    assert len(directories) - len(set(directories)) == 1
    jobs = {job.name: job for plan in (one, two) for job in plan.jobs}
    assert len(fingerprints(list(jobs.values()))) == len(directories) - 1


def test_without_reuse_they_share_nothing(recipe, tmp_path):
    made = planner(recipe, tmp_path, reuse=False)
    one, two = made.plan(Trial(("clip", "sam"))), made.plan(Trial(("clip", "convnext")))
    directories = {job.directory for plan in (one, two) for job in plan.jobs}
    places = {stage.checkpoint for plan in (one, two) for stage in plan.stages}
    jobs = {job.name: job for plan in (one, two) for job in plan.jobs}
    assert len(directories) == len(jobs) == 10
    assert len(places) == 8
    assert all(tmp_path / "out" in place.parents for place in places)


def test_a_seed_and_a_budget_leave_the_aligned_experts_alone(recipe, tmp_path):
    made = planner(recipe, tmp_path)
    base = made.plan(Trial(("clip",)))
    assert changed(base, made.plan(Trial(("clip",), seed=1))) == {"align", "sft", "score"}
    assert changed(base, made.plan(Trial(("clip",), budget=0.5))) == {"align", "sft", "score"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.sft.args.learning_rate=0.5", {"sft", "score"}),
        ("stages.align.batch_size=4", {"align", "sft", "score"}),
        ("stages.pre_align.lr.experts=0.5", {"pre_align/clip", "align", "sft", "score"}),
        ("seed=7", {"pre_align/clip", "align", "sft", "score"}),
        ("stages.sft.args.logging_steps=7", set()),
        ("stages.sft.eval=null", set()),
        ("output_dir=elsewhere", set()),
        ("name=other", set()),
    ],
)
def test_what_determines_a_result_is_in_its_key(world, tmp_path, override, expected):
    # `seed` of the recipe is that of pre-alignment; later stages start from what it made
    one = planner(parse_recipe(world, "recipe"), tmp_path).plan(Trial(("clip",)))
    two = planner(parse_recipe(world, "recipe", [override]), tmp_path).plan(Trial(("clip",)))
    assert changed(one, two) == expected


def test_code_questions_data_and_weights_are_in_the_keys(world, tmp_path):
    folder = tmp_path / "world"
    recipe = parse_recipe(make_world(folder, ("clip",)), "recipe")
    write_suite(folder / "suite")
    trial = Trial(("clip",))
    base = planner(recipe, tmp_path).plan(trial)
    every = {"pre_align/clip", "align", "sft", "score"}
    assert changed(base, planner(recipe, tmp_path).plan(trial)) == set()
    assert changed(base, planner(recipe, tmp_path, code="2").plan(trial)) == every
    assert changed(base, planner(recipe, tmp_path, limit=3).plan(trial)) == {"score"}
    write_suite(folder / "suite", per_skill=5)
    assert changed(base, planner(recipe, tmp_path).plan(trial)) == {"score"}
    with (folder / "captions.jsonl").open("a") as file:
        file.write((folder / "captions.jsonl").read_text().splitlines()[0] + "\n")
    assert changed(base, planner(recipe, tmp_path).plan(trial)) == {"align", "sft", "score"}
    expert = folder / "experts/clip/expert.safetensors"
    expert.write_bytes(expert.read_bytes()[:-1] + b"\x07")
    assert changed(base, planner(recipe, tmp_path).plan(trial)) == every


def test_the_order_of_a_mixture_is_part_of_it(recipe, tmp_path):
    made = planner(recipe, tmp_path)
    one, two = made.plan(Trial(("clip", "sam"))), made.plan(Trial(("sam", "clip")))
    assert changed(one, two) == {"align", "sft", "score"}


def test_the_recipe_of_a_mixture_names_its_experts_only(world):
    data = json.loads(json.dumps(world))
    data["stages"]["pre_align"]["trainable"] = ["experts.clip", "experts.sam", "connector"]
    data["stages"]["pre_align"]["lr"] = {"connector": 1e-3}
    data["stages"]["sft"]["lr"] = {"experts.clip": 1e-5, "experts.sam": 1e-4}
    data["stages"]["sft"]["trainable"] = ["experts", "connector"]
    whole = parse_recipe(data, "recipe")
    two = recipe_of(whole, ("clip", "convnext"))
    assert two.experts == ("clip", "convnext")
    assert set(two.init.experts) == {"clip", "convnext"}
    assert two.stages["pre_align"].trainable == ["experts.clip", "connector"]
    assert two.stages["sft"].lr == {"experts.clip": 1e-5}
    alone = recipe_of(whole, ("convnext",))
    assert list(alone.stages) == ["align", "sft"], "nothing of it learns in pre_align"
    assert alone.stages["align"].sources == ()


def test_a_budget_shortens_what_trains_mixtures(world):
    data = json.loads(json.dumps(world))
    data["stages"]["pre_align"]["args"]["max_steps"] = 100
    data["stages"]["align"]["args"] |= {"max_steps": -1, "num_train_epochs": 2}
    data["stages"]["sft"]["args"] |= {
        "max_steps": 100,
        "warmup_steps": 10,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 50, "decay_type": "linear"},
    }
    short = seeded(parse_recipe(data, "recipe"), 3, 0.25)
    assert short.seed == 3
    assert short.stages["pre_align"].args["max_steps"] == 100
    assert short.stages["align"].args["num_train_epochs"] == 0.5
    sft = short.stages["sft"].args
    assert (sft["max_steps"], sft["warmup_steps"]) == (25, 2)
    assert sft["lr_scheduler_kwargs"] == {"num_decay_steps": 12, "decay_type": "linear"}
    share = seeded(parse_recipe(data, "recipe", ["stages.sft.args.warmup_steps=0.03"]), 3, 0.25)
    assert share.stages["sft"].args["warmup_steps"] == 0.03


def test_experts_that_no_other_mixture_could_use_are_refused(world, tmp_path):
    data = json.loads(json.dumps(world))
    late = {**data["stages"]["pre_align"], "init_from": ["align"]}
    data["stages"] = {
        "align": {**data["stages"]["align"], "init_from": []},
        "pre_align": late,
        "sft": data["stages"]["sft"],
    }
    with pytest.raises(ValueError, match=r"stages.pre_align is per_expert .* Move it to the front"):
        planner(parse_recipe(data, "recipe"), tmp_path)


def test_a_recipe_without_a_mixture_is_refused(world, tmp_path):
    data = json.loads(json.dumps(world))
    del data["stages"]["align"], data["stages"]["sft"]
    with pytest.raises(ValueError, match="no stage trains a mixture"):
        planner(parse_recipe(data, "recipe"), tmp_path)
