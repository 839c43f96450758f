from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_moe.build import load_model
from eagle_moe.checkpoint import read_complete, read_provenance
from eagle_moe.experts import resolve_expert
from train.recipe import Recipe, load_recipe
from train.run import main, run_recipe
from train.shrink import ARGUMENT_SIZES, STAGE_SIZES, shrink, shrink_expert
from train.stages import stage_runs

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
FULL_SIZE = sorted(RECIPES.glob("eagle-*.yaml"))


def shrunken(path: Path, folder: Path, *overrides: str) -> tuple[Recipe, Recipe]:
    """A recipe of the repository, and its shrunken form in `folder`."""
    full = load_recipe(path, [f"output_dir={folder / 'run'}", *overrides])
    return full, shrink(full)


def without_sizes(recipe: Recipe) -> dict[str, Any]:
    """What shrinking must leave as it is."""
    told = recipe.dump()
    for name in ("name", "output_dir", "init", "engine", "features_dir", "model"):
        del told[name]
    for entry in told["data"].values():
        for key in ("path", "image_root"):
            del entry[key]
    for stage in told["stages"].values():
        for key in ARGUMENT_SIZES.keys() | {"num_train_epochs"}:
            stage["args"].pop(key, None)
        for key in STAGE_SIZES - {"args", "init_from"}:
            stage.pop(key, None)
    return told


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_all_that_is_no_size_stays(path: Path, tmp_path: Path) -> None:
    full, small = shrunken(path, tmp_path)
    assert without_sizes(small) == without_sizes(full)
    for name, stage in full.stages.items():
        assert small.stages[name].args.keys() - stage.args.keys() <= {
            "max_steps",
            "report_to",
        }
        for run, tiny in zip(stage_runs(full, name), stage_runs(small, name), strict=True):
            assert (run.trainable, run.rates(1.0)) == (tiny.trainable, tiny.rates(1.0))
    assert small.experts == full.experts
    assert small.model.template == full.model.template
    assert small.model.connector == full.model.connector
    fusion = {**small.model.fusion, "grid": full.model.fusion["grid"]}
    assert fusion == full.model.fusion


def test_experts_keep_the_profiles_rules_and_switches() -> None:
    entry = {
        "preset": "sam",
        "name": "mine",
        "view": {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"},
        "arch": {"neck": "original", "unshuffle": 4, "norm_eps": 1e-5},
    }
    full = resolve_expert(entry)
    small = shrink_expert(full)
    assert small.name == "mine"
    assert small.view == full.view.model_copy(update={"size": 64})
    assert small.arch == {
        **resolve_expert("sam-tiny").arch,
        "neck": "original",
        "unshuffle": 4,
        "norm_eps": 1e-5,
    }
    clip = resolve_expert({"preset": "clip", "arch": {"keep_cls": True}})
    assert shrink_expert(clip).arch["keep_cls"]
    assert shrink_expert(small) == small
    assert shrink_expert(resolve_expert("timm:resnet18")).kind.startswith("timm:test_vit")


def test_a_kind_without_a_tiny_preset_is_named() -> None:
    spec = resolve_expert("clip").model_copy(update={"kind": "open_clip:ViT-B-32"})
    with pytest.raises(ValueError, match="kind open_clip:ViT-B-32 have no preset"):
        shrink_expert(spec)


@pytest.mark.parametrize("mixture", ["x4", "x5"])
def test_recipes_that_differ_in_the_language_models_size_shrink_to_the_same(
    mixture: str, tmp_path: Path
) -> None:
    """So a run of one stands for both."""
    small, large = (
        shrunken(RECIPES / f"eagle-{mixture}-vicuna-{size}.yaml", tmp_path)[1].dump()
        for size in ("7b", "13b")
    )
    assert {**small, "name": ""} == {**large, "name": ""}


def test_these_are_all_full_size_recipes() -> None:
    """Those that the next test runs, and those that shrink to the same."""
    assert [path.stem for path in FULL_SIZE] == [
        f"eagle-{mixture}-{family}"
        for mixture in ("x4", "x5")
        for family in ("llama3-8b", "vicuna-13b", "vicuna-7b")
    ]


@pytest.mark.parametrize("family", ["vicuna-7b", "llama3-8b"])
def test_every_full_size_recipe_goes_through(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """X4 after X5 in the same folder: experts that both pre-align are pre-aligned once."""
    for mixture in ("x5", "x4"):
        full, small = shrunken(RECIPES / f"eagle-{mixture}-{family}.yaml", tmp_path)
        folder = run_recipe(small, redo=True)
        assert folder == tmp_path / "run-shrunken" / "sft"
        check_result(folder, full.experts)
    assert capsys.readouterr().out.count("finished before") == 4


def check_result(folder: Path, experts: tuple[str, ...]) -> None:
    """A whole checkpoint of a toy, with the stages behind each part that the recipe says."""
    assert read_complete(folder) is not None
    history = {part: record.history for part, record in read_provenance(folder).items()}
    for name in experts:
        assert history[f"experts.{name}"][1:] == [f"pre_align/{name}", "align", "sft"]
    assert history["connector"][1:] == ["align", "sft"]
    assert history["language_model"][1:] == ["sft"]
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in log if "loss" in entry]) == 2
    model = load_model(folder)
    assert sum(value.numel() for value in model.parameters()) < 3_000_000
    assert tuple(model.model.vision_tower.towers) == experts
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())


def test_the_command_line_runs_a_stage_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(RECIPES / "mini-reader.yaml")
    told = [path, "--shrink", f"output_dir={tmp_path / 'run'}", "--stage", "read"]
    assert main(told) == 0
    assert "step 2/2" in capsys.readouterr().out
    assert main(told) == 0
    assert "finished before" in capsys.readouterr().out


def test_inputs_are_the_same_however_often_they_are_made(tmp_path: Path) -> None:
    """Several processes make them at once; whose are taken must not matter."""
    path = RECIPES / "mini-reader.yaml"

    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }

    shrunken(path, tmp_path / "a")
    torch.manual_seed(7)
    shrunken(path, tmp_path / "b")
    assert files(tmp_path / "a" / "run-shrunken") == files(tmp_path / "b" / "run-shrunken")


def test_under_a_launcher_the_engine_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FULL_SIZE[0]
    full, small = shrunken(path, tmp_path, "stages.sft.engine=ddp")
    assert {stage.engine or small.engine for stage in small.stages.values()} == {"auto"}
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    _, spread = shrunken(path, tmp_path, "stages.sft.engine=ddp")
    assert [s.engine for s in spread.stages.values()] == [s.engine for s in full.stages.values()]
    assert spread.engine == full.engine
