"""`eagle-moe import`: official releases in, ordinary checkpoints out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import eagle_moe
from eagle_moe.build import build_config, build_model, load_model_spec
from eagle_moe.checkpoint import PROVENANCE, read_complete, read_provenance
from eagle_moe.cli import main
from eagle_moe.interop.eagle_release import TOWERS, read_release, release_rules, release_spec
from eagle_moe.interop.importer import REPORT
from eagle_moe.interop.keymap import make_plan
from eagle_moe.parts import all_parts, model_tensors
from eagle_moe.profile import Profile
from tests.official_layout import TINY_GEOMETRY, X4, X5, Sizes, layout
from tests.official_release import (
    do_import,
    official_tokenizer,
    release_config,
    write_release,
    write_weights,
    write_world,
)

eagle_moe.register()
MODELS = Path(__file__).parents[1] / "configs" / "models"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


# What an import gives


def test_the_import_loads_through_auto_classes_and_answers(world, tmp_path):
    target = tmp_path / "ours"
    do_import(world / "release", target, world / "geometry.yaml")
    model = AutoModelForImageTextToText.from_pretrained(target)
    processor = AutoProcessor.from_pretrained(target)
    inputs = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": torch.zeros(3, 40, 60).byte()},
                    {"type": "text", "text": "What?"},
                ],
            }
        ],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**inputs, max_new_tokens=5, do_sample=True)
    assert written.shape[1] > inputs["input_ids"].shape[1]
    assert inputs["pixel_values"].shape[-1] == 128
    assert processor.image_processor.fit == "pad"
    assert processor.tokenizer.model_max_length == 2048


def test_it_is_a_checkpoint_that_training_can_start_from(world, tmp_path):
    target = tmp_path / "ours"
    do_import(world / "release", target, world / "geometry.yaml")
    assert read_complete(target) is not None
    records = read_provenance(target)
    assert list(records) and set(records) == set(all_parts(list(TOWERS.values())))
    assert records["connector"].history[0].startswith("official Eagle release release")
    wanted = {part: record.parameters for part, record in records.items()}
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert sum(wanted.values()) == sum(p.numel() for p in model.parameters())


def test_every_tensor_arrives_unchanged(world, tmp_path):
    ours = do_import(world / "release", tmp_path / "ours", world / "geometry.yaml")
    theirs = {
        k: v
        for file in (world / "release").glob("*.safetensors")
        for k, v in load_file(file).items()
    }
    report = json.loads((tmp_path / "ours" / REPORT).read_text())
    assert set(report["mapped"]) | set(report["ignored"]) == set(theirs)
    assert set(report["mapped"].values()) == set(ours)
    assert all(report["ignored"].values()), "every key that is left out says why"
    for key, name in report["mapped"].items():
        theirs_flat, ours_flat = theirs[key].flatten(), ours[name].flatten()
        if "embed_tokens" in key or "lm_head" in key:
            assert torch.equal(ours[name][: len(theirs[key])], theirs[key])
            torch.testing.assert_close(ours[name][-1], theirs[key].mean(0))
        elif key.endswith(("position_embedding.weight", "tower.pos_embed")) and "2.vis" not in key:
            assert torch.equal(ours_flat, theirs_flat[-ours_flat.numel() :])  # without the CLS row
        else:
            assert torch.equal(ours_flat, theirs_flat), key


@pytest.mark.parametrize(("form", "shards"), [("bin", 1), ("bin", 4), ("safetensors", 1)])
def test_every_form_of_the_same_weights_gives_the_same_files(world, tmp_path, form, shards):
    again = tmp_path / "release"
    write_release(again, official_tokenizer(), shards=shards, form=form)
    expected = do_import(world / "release", tmp_path / "a", world / "geometry.yaml")
    given = do_import(again, tmp_path / "b", world / "geometry.yaml", limit=40_000)
    assert set(given) == set(expected)
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    files = list((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        sizes = [value.nbytes for value in load_file(file).values()]
        assert sum(sizes) <= 40_000 or len(sizes) == 1
    assert read_provenance(tmp_path / "a") != {}
    hashes = [{p: r.sha256 for p, r in read_provenance(tmp_path / x).items()} for x in "ab"]
    assert hashes[0] == hashes[1]


def test_x4_and_half_precision_and_cropping(tmp_path):
    source = tmp_path / "release"
    tensors = write_release(source, official_tokenizer(), towers=X4, image_aspect_ratio="square")
    write_weights(source, {key: value.bfloat16() for key, value in tensors.items()})
    geometry = {**TINY_GEOMETRY, "experts": dict(TINY_GEOMETRY["experts"])}
    del geometry["experts"]["sam"]
    ours = do_import(source, tmp_path / "ours", geometry)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert list(model.model.vision_tower.towers) == ["clip", "convnext", "eva02", "pix2struct"]
    assert AutoProcessor.from_pretrained(tmp_path / "ours").image_processor.fit == "crop"


@pytest.mark.parametrize(
    ("special", "template_sign", "end"),
    [
        ((), "ASSISTANT:", "</s>"),
        (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "<|eot_id|>"),
        (("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    ],
    ids=["vicuna", "llama3", "yi"],
)
def test_prompts_and_the_end_of_a_turn_follow_the_language_model(
    tmp_path, special, template_sign, end
):
    source, target = tmp_path / "release", tmp_path / "ours"
    write_release(source, official_tokenizer(*special))
    do_import(source, target)
    processor = AutoProcessor.from_pretrained(target)
    assert template_sign in processor.chat_template
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert processor.tokenizer.convert_tokens_to_ids(end) in model.generation_config.eos_token_id


def test_generation_never_writes_a_token_that_the_release_lacks(world, tmp_path):
    do_import(world / "release", tmp_path / "ours", world / "geometry.yaml")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    vocabulary = len(official_tokenizer())
    assert model.config.text_config.vocab_size > vocabulary
    with torch.no_grad():  # tokens of its own are much less likely than those that were added
        model.lm_head.weight[:vocabulary] *= 1e-3
    torch.manual_seed(0)
    tokens = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=40, do_sample=True)
    assert tokens.max() < vocabulary


# Full size, on the meta device


@pytest.mark.parametrize(
    ("towers", "name", "sizes"),
    [
        (X5, "eagle-x5-vicuna-7b", Sizes()),
        (X4, "eagle-x4-vicuna-7b", Sizes()),
        (X5, "eagle-x5-vicuna-13b", Sizes(llm=(5120, 13824, 40, 5120))),
        (X5, "eagle-x5-llama3-8b", Sizes(vocabulary=128_257, llm=(4096, 14336, 32, 1024))),
        (X5, None, Sizes(vocabulary=64_000, llm=(7168, 20480, 60, 1024))),
    ],
    ids=["x5-7b", "x4-7b", "x5-13b", "x5-llama3-8b", "x5-yi-34b"],
)
def test_every_key_of_a_full_size_release_is_mapped_or_ignored_with_a_reason(
    tmp_path, towers, name, sizes
):
    width, hidden, layers, kv = sizes.llm
    llm = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": kv // 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(release_config(sizes, towers, **llm)))
    fields = read_release(tmp_path)
    spec = release_spec(*fields, tmp_path, Profile(), "vicuna")
    config = build_config(spec, image_token_id=sizes.vocabulary)
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in model_tensors(build_model(config)).items()}
    shapes = layout(sizes, towers)
    plan = make_plan(shapes, release_rules(config, sizes.vocabulary), expected, "release")
    assert set(plan.placed) | set(plan.ignored) == set(shapes)
    assert {name for name, _ in plan.placed.values()} == set(expected)
    assert all(plan.ignored.values())
    if (towers, name) == (X5, "eagle-x5-vicuna-7b"):
        assert len(shapes) == 2086
    if name is not None:  # the recipes' model is the release's
        ours = build_config(load_model_spec(MODELS / f"{name}.yaml"), sizes.vocabulary)
        assert ours.vision_config.to_dict() == config.vision_config.to_dict()
        assert ours.connector == config.connector


def test_the_geometry_in_the_docs_is_one(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "import.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- test: geometry -->\n```yaml\n(.*?)```", page, re.DOTALL)
    assert found
    geometry = Profile.parse(yaml.safe_load(found[1]), "docs/import.md")
    (tmp_path / "config.json").write_text(json.dumps(release_config(Sizes(), X5, hidden_size=64)))
    spec = release_spec(*read_release(tmp_path), tmp_path, geometry, "vicuna")
    config = build_config(spec, image_token_id=32_000)
    assert config.num_image_tokens == 256
    with torch.device("meta"):
        assert build_model(config).model.vision_tower.towers["clip"].channels == 768


# The command


def test_the_command_shows_parts_and_reasons(world, tmp_path, capsys):
    target = tmp_path / "ours"
    code = main(
        [
            "import",
            str(world / "release"),
            str(target),
            "--geometry",
            str(world / "geometry.yaml"),
            "--template",
            "short",
        ]
    )
    text = capsys.readouterr().out
    assert code == 0
    for part in all_parts(list(TOWERS.values())):
        assert part in text
    assert "computed, not learned" in text
    assert (target / PROVENANCE).is_file()
    with safe_open(target / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
