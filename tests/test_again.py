"""train/again.py: a recipe once more, with one expert fewer or another seed, on what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eagle_moe.checkpoint import read_complete, read_provenance
from tests.tiny_run import make_recipe, make_world
from train.again import main, recipe_again
from train.recipe import load_recipe, parse_recipe
from train.run import run_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    run_recipe(make_recipe(folder), stage="pre_align")
    return folder


def test_only_what_the_expert_touches_changes(world):
    whole = parse_recipe(make_recipe(world), "tiny")
    rest = recipe_again(whole, "clip")
    assert rest.experts == ("convnext",)
    assert list(rest.init.experts) == ["convnext"]
    assert list(rest.stages) == ["align", "sft"]
    assert Path(rest.output_dir) == world / "run" / "again" / "without-clip" / "seed-42"
    (source,) = rest.stages["align"].sources
    assert source.checkpoint == str(world / "run" / "pre_align")
    for name, stage in rest.stages.items():
        same = whole.stages[name].dump() | {"init_from": None, "lr": {}}
        assert stage.dump() | {"init_from": None, "lr": {}} == same
    assert rest.stages["sft"].lr == {}  # it was for clip
    assert (rest.seed, rest.data) == (whole.seed, whole.data)
    assert rest.model.fusion == whole.model.fusion


def test_the_command_trains_from_a_checkpoints_own_recipe(world, capsys):
    recipe = world / "run" / "pre_align" / "clip" / "recipe.yaml"
    assert main([str(recipe), "--without", "clip"]) == 0
    folder = world / "run" / "again" / "without-clip" / "seed-42"
    assert f"trained again: {folder / 'sft'}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["align", "sft"]
    assert read_complete(folder / "sft") is not None
    assert "experts.convnext" in read_provenance(folder / "sft")
    assert "experts.clip" not in read_provenance(folder / "sft")
    # frozen in `align`: the very weights that pre-alignment has left
    made, taken = (
        read_provenance(world / "run" / place)["experts.convnext"].sha256
        for place in ("pre_align/convnext", "again/without-clip/seed-42/align")
    )
    assert made == taken
    assert main([str(recipe), "--without", "clip"]) == 0
    assert "finished before" in capsys.readouterr().out


def test_another_seed_starts_from_the_same_experts_and_ends_elsewhere(world, capsys):
    recipe = world / "run" / "pre_align" / "clip" / "recipe.yaml"
    ends = {}
    for seed in ("1", "2"):
        assert main([str(recipe), "--seed", seed]) == 0
        folder = world / "run" / "again" / "all" / f"seed-{seed}"
        assert f"trained again: {folder / 'sft'}" in capsys.readouterr().out
        assert load_recipe(folder / "sft" / "recipe.yaml").seed == int(seed)
        made = read_provenance(folder / "align")
        for name in ("clip", "convnext"):
            before = read_provenance(world / "run" / "pre_align" / name)[f"experts.{name}"]
            assert made[f"experts.{name}"].sha256 == before.sha256
        ends[seed] = read_provenance(folder / "sft")["connector"].sha256
    assert ends["1"] != ends["2"]
    assert main([str(recipe), "--seed", "1", "--without", "clip"]) == 0
    assert f"{Path('without-clip', 'seed-1', 'sft')}" in capsys.readouterr().out


def test_the_demo_is_retrained_as_clip_alone_was():
    """`train.demo` has the same idea for its reference: the same stages, from the same places."""
    whole = load_recipe("configs/recipes/mini.yaml", ["output_dir=runs/demo/mixture"])
    rest = recipe_again(whole, "sam")
    assert rest.experts == ("clip", "convnext", "eva02", "pix2struct")
    places = [source.checkpoint for source in rest.stages["align"].sources]
    assert places == ["runs/demo/reader/read", "runs/demo/mixture/pre_align"]


def stages_left(world: Path, *names: str) -> dict[str, Any]:
    recipe = make_recipe(world)
    return recipe | {"stages": {name: recipe["stages"][name] for name in names}}


def test_what_cannot_be_is_refused(world, capsys):
    recipe = str(world / "run" / "pre_align" / "clip" / "recipe.yaml")
    for same in ([], ["--seed", "42"]):
        assert main([recipe, *same]) == 2
        assert "its seed is 42, so that would be the same run" in capsys.readouterr().err
    assert main([recipe, "--without", "clipp"]) == 2
    assert 'no expert "clipp". Did you mean "clip"' in capsys.readouterr().err
    with pytest.raises(ValueError, match="no stage trains a mixture"):
        recipe_again(parse_recipe(stages_left(world, "pre_align"), "tiny"), "clip")
    alone = recipe_again(load_recipe(recipe), "clip")
    with pytest.raises(ValueError, match="convnext is its only expert"):
        recipe_again(alone, "convnext")


def test_without_the_first_run_there_is_nothing_to_start_from(world, tmp_path, capsys):
    recipe = str(world / "run" / "pre_align" / "clip" / "recipe.yaml")
    assert main([recipe, f"output_dir={tmp_path}/other", "--without", "clip"]) == 2
    said = capsys.readouterr().err
    assert "other/pre_align does not exist. Run the stage that makes it first" in said
    assert not (tmp_path / "other" / "again").exists()
