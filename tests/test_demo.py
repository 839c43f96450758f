"""The demo's graph: every job can be run, nothing is missing, models differ where they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle_moe.schema import load_yaml
from train.demo import CONFIGS, MODELS, Demo, DemoSettings, main
from train.jobs import Job
from train.jobs.graph import fingerprints
from train.material import make_stage
from train.recipe import Recipe, load_recipe

SIZES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def graph(size: str) -> list[Job]:
    settings = DemoSettings.parse(load_yaml(CONFIGS / f"{size}.yaml"), size)
    return Demo(settings, Path("runs/made-up")).jobs()


@pytest.fixture(params=SIZES)
def jobs(request) -> dict[str, Job]:
    return {job.name: job for job in graph(request.param)}


def recipe_of(job: Job) -> Recipe:
    return load_recipe(job.kwargs["recipe"], job.kwargs["overrides"])


def test_the_graph_is_whole(jobs):
    assert len(fingerprints(list(jobs.values()))) == len(jobs)
    assert {f"{model}/score" for model in MODELS} <= set(jobs)


def test_another_version_of_the_suite_makes_everything_anew(monkeypatch):
    before = fingerprints(graph("smoke"))
    assert fingerprints(graph("smoke")) == before
    monkeypatch.setattr("train.material.VERSION", 999)
    after = fingerprints(graph("smoke"))
    assert not [name for name in before if after[name] == before[name]]


def test_every_stage_parses_and_stays_in_its_folder(jobs):
    stages = [job for job in jobs.values() if job.function is make_stage]
    assert len(stages) > len(MODELS)
    for job in stages:
        recipe = recipe_of(job)
        assert job.kwargs["stage"] in recipe.stages
        assert recipe.output_dir.startswith("runs/made-up/")
        for source in recipe.stages[job.kwargs["stage"]].sources:
            assert source.checkpoint in recipe.stages or "runs/made-up" in source.checkpoint


def test_models_have_the_same_recipe_and_budget(jobs):
    mixture, clip, blind = (recipe_of(jobs[f"{m}/sft"]) for m in ("mixture", "clip_only", "blind"))
    assert mixture.stages["sft"].args == clip.stages["sft"].args == blind.stages["sft"].args
    assert mixture.stages["align"].args == clip.stages["align"].args
    assert clip.experts == ("clip",)
    assert mixture.experts[0] == "clip"
    assert len(mixture.experts) == 5


def test_the_blind_model_sees_nothing(jobs):
    recipe = recipe_of(jobs["blind/sft"])
    stage = recipe.stages["sft"]
    assert stage.eval is not None
    for name in (*stage.data, stage.eval.data):
        assert recipe.data[name].images == "drop"
    assert jobs["blind/score"].kwargs["images"] == "drop"
    assert recipe_of(jobs["mixture/sft"]).data["questions"].images == "keep"


def test_an_unknown_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["enormous"])
    assert "mini" in capsys.readouterr().err
