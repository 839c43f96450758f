from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from eagle_moe.build import build_config
from eagle_moe.experts import resolve_expert
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import PROJECTOR, model_tensors, part_of
from tests.conftest import make_tokenizer
from tests.tiny_run import make_recipe, make_world
from train.recipe import parse_recipe
from train.sources import find_origins
from train.stages import stage_runs
from train.weights import load_model, origin_history

IMAGE_TOKEN = 3


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_world(tmp_path)
    return tmp_path


def build(
    world: Path, *overrides: str, image_token_id: int = IMAGE_TOKEN
) -> EagleMixForConditionalGeneration:
    """The model that `sft` starts from when it starts from `init`."""
    start = ["stages.sft.init_from=[]", *overrides]
    (run,) = stage_runs(parse_recipe(make_recipe(world), "recipe", start), "sft")
    return load_model(run, build_config(run.model_spec, image_token_id), find_origins(run))


def change_tensors(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_each_part_has_the_weights_it_was_given(world: Path) -> None:
    built = model_tensors(build(world))
    for name in ("clip", "convnext"):
        given = load_file(world / "experts" / name / "expert.safetensors")
        prefix = f"model.vision_tower.towers.{name}."
        held = {key.removeprefix(prefix): v for key, v in built.items() if key.startswith(prefix)}
        assert held.keys() == given.keys()
        assert all(torch.equal(held[key], given[key]) for key in held)
    for key, value in load_file(world / "llm" / "model.safetensors").items():
        name = key if key.startswith("lm_head") else f"model.language_model.{key[6:]}"
        assert torch.equal(built[name], value)


def test_random_parts_follow_the_seed_alone(world: Path) -> None:
    torch.manual_seed(99)
    first = model_tensors(build(world))
    torch.manual_seed(100)
    second, other = model_tensors(build(world)), model_tensors(build(world, "seed=1"))
    connector = [name for name in first if part_of(name) == "connector" and first[name].dim() > 1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert connector and all(not torch.equal(first[name], other[name]) for name in connector)
    assert all(first[name].std() > 0 for name in connector)


def test_a_part_may_be_random_on_purpose(world: Path) -> None:
    given, drawn = (
        model_tensors(build(world)),
        model_tensors(build(world, "init.experts.clip=random")),
    )
    changed = {part_of(name) for name in given if not torch.equal(given[name], drawn[name])}
    assert "experts.clip" in changed
    assert not changed & {"experts.convnext", "language_model"}


@pytest.mark.parametrize("kind", ["missing", "left over", "shape"])
def test_an_expert_loads_strictly(world: Path, kind: str) -> None:
    path = world / "experts" / "clip" / "expert.safetensors"
    name = next(iter(load_file(path)))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if kind == "missing":
            del tensors[name]
        elif kind == "left over":
            tensors["extra.weight"] = torch.zeros(1)
        else:
            tensors[name] = torch.zeros(5, 7)

    change_tensors(path, change)
    expected = "extra.weight" if kind == "left over" else name
    with pytest.raises(ValueError, match=f"{kind}.*model.vision_tower.towers.clip.{expected}"):
        build(world)


@pytest.mark.parametrize("kind", ["missing", "left over", "of another shape"])
def test_a_language_model_loads_strictly(world: Path, kind: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if kind == "missing":
            del tensors["model.norm.weight"]
        elif kind == "left over":
            tensors["model.extra.weight"] = torch.zeros(1)
        else:
            tensors["model.norm.weight"] = torch.zeros(3)

    change_tensors(world / "llm" / "model.safetensors", change)
    with pytest.raises(ValueError, match=f"init.language_model.*\n{kind}: .*(norm|extra)"):
        build(world)


def test_weights_for_another_architecture_are_refused(world: Path) -> None:
    path = world / "experts" / "clip" / "expert.json"
    spec = json.loads(path.read_text())
    spec["view"]["mean"] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"init.experts.clip: the weights were made for view"):
        build(world)


def test_a_config_that_is_not_the_language_models_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match=r"rms_norm_eps = 1e-06, but the model says 0.5"):
        build(world, "model.language_model.config.rms_norm_eps=0.5")


def test_a_grown_vocabulary_gets_the_mean_row(world: Path) -> None:
    size = len(make_tokenizer())
    model = build(world, image_token_id=size)
    rows = model.get_input_embeddings().weight
    given = load_file(world / "llm" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(rows) > size and torch.equal(rows[:size], given)
    assert torch.allclose(rows[size:], given.mean(0).expand_as(rows[size:]))


def test_a_bare_file_is_an_expert_too(world: Path) -> None:
    shutil.copy(world / "experts/clip/expert.safetensors", world / "clip.safetensors")
    one = model_tensors(build(world))
    other = model_tensors(build(world, f"init.experts.clip={world / 'clip.safetensors'}"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def original_of_clip(folder: Path) -> CLIPVisionModel:
    """transformers' own model of the size of `clip-tiny`, saved as it does that."""
    arch = resolve_expert("clip-tiny").arch
    config = CLIPVisionConfig(
        hidden_size=arch["hidden_size"],
        intermediate_size=arch["mlp_size"],
        num_hidden_layers=arch["layers"],
        num_attention_heads=arch["heads"],
        image_size=arch["image_size"],
        patch_size=arch["patch_size"],
    )
    model = CLIPVisionModel(config)
    model.save_pretrained(folder)
    return model


def test_an_original_checkpoint_fits_any_view(world: Path) -> None:
    theirs = original_of_clip(world / "original")
    view = "model.experts.0.view={size: 64, mean: [0, 0, 0]}"
    built = model_tensors(build(world, f"init.experts.clip={world / 'original'}", view))
    held = {name: value for name, value in built.items() if ".towers.clip." in name}
    assert len(held) == len(theirs.state_dict()) - 3  # the CLS token, and the final norm's two
    name = "model.vision_tower.towers.clip.layers.1.mlp.fc1.weight"
    assert torch.equal(held[name], theirs.state_dict()["encoder.layers.1.mlp.fc1.weight"])
    with pytest.raises(ValueError, match=r"init.experts.clip: the weights were made for view"):
        build(world, view)  # our own folder, of an expert that has learned under another view


def test_an_original_checkpoint_from_the_hub(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = original_of_clip(world / "snapshot")
    asked = []

    def download(repo: str, **options: Any) -> str:
        asked.append(repo)
        return str(world / "snapshot")

    monkeypatch.setattr("eagle_moe.interop.fetch.snapshot_download", download)
    card = "model.experts.0.card={checkpoint: some/clip}"
    for place in ("pretrained", "other/clip"):
        built = model_tensors(build(world, f"init.experts.clip={place}", card))
        name = "model.vision_tower.towers.clip.layers.0.layer_norm1.weight"
        assert torch.equal(built[name], theirs.state_dict()["encoder.layers.0.layer_norm1.weight"])
    assert asked == ["some/clip", "other/clip"]


def test_the_history_of_an_original_names_file_and_format(world: Path) -> None:
    original_of_clip(world / "original")
    overrides = ["stages.sft.init_from=[]", f"init.experts.clip={world / 'original'}"]
    (run,) = stage_runs(parse_recipe(make_recipe(world), "recipe", overrides), "sft")
    (history,) = origin_history("experts.clip", find_origins(run)["experts.clip"], 0)
    folder = world / "original"
    assert history.startswith(f"{folder}: model.safetensors (a folder of transformers' CLIPModel")


def test_weights_may_be_bfloat16(world: Path) -> None:
    assert {p.dtype for p in build(world, "dtype=bfloat16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_a_connector_starts_from_an_official_projector(world: Path, prefix: str) -> None:
    plain = "model.fusion.norm=none"  # the release has no norms, so its projector brings none
    drawn = model_tensors(build(world, plain))
    layers = {
        name.removeprefix(f"{PROJECTOR}layers."): torch.randn_like(value)
        for name, value in drawn.items()
        if name.startswith(PROJECTOR)
    }
    torch.save({prefix + name: value for name, value in layers.items()}, world / "mm_projector.bin")
    for place in (world, world / "mm_projector.bin"):
        given = model_tensors(build(world, plain, f"init.connector={place}"))
        assert all(torch.equal(given[f"{PROJECTOR}layers.{n}"], v) for n, v in layers.items())


def test_a_projector_of_another_model_is_named(world: Path) -> None:
    path = world / "mm_projector.bin"
    torch.save({"model.mm_projector.0.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=r"mm_projector.bin: is not the projector.*\[3, 3\]"):
        build(world, f"init.connector={path}")
    with pytest.raises(FileNotFoundError, match=r"init.connector: no file or folder .*nowhere"):
        build(world, "init.connector=nowhere")
