from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from eagle_moe.build import (
    ModelSpec,
    build_config,
    build_model,
    build_processor,
    load_model,
    load_model_spec,
    load_tokenizer,
)
from eagle_moe.canvas import CLIP_MEAN
from tests.conftest import make_tokenizer

MODELS = Path(__file__).parents[1] / "configs" / "models"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def spec(**changes: object) -> ModelSpec:
    fields = {
        "canvas": {"size": 64, "fit": "crop"},
        "experts": ["clip-tiny"],
        "fusion": {"kind": "channel_concat", "grid": 4},
        "language_model": {"checkpoint": "somewhere", "config": LLAMA},
        "template": "short",
    }
    return ModelSpec.parse({**fields, **changes}, "spec")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Full-size models: parameters in millions as measured on the official modules. The release keeps
# CLIP's final norm (2 x 1024) and ConvNeXt's classifier (norm 2 x 3072, 1000 x 3073): both unused.
EXPERTS = {
    "clip": 303.5,
    "convnext": 846.5 - (2 * 3072 + 1000 * 3073) / 1e6,
    "sam": 307.7,
    "eva02": 303.4,
    "pix2struct": 512.8,
}
LANGUAGE_MODELS = {
    "vicuna-7b": (6_738_415_616, 4096, 32_000),
    "vicuna-13b": (13_015_864_320, 5120, 32_000),
    "llama3-8b": (8_030_261_248, 4096, 128_256),
}
CHANNELS = {"x4": 6656, "x5": 7680}


@pytest.mark.parametrize("llm", LANGUAGE_MODELS)
@pytest.mark.parametrize("mixture", CHANNELS)
def test_full_size_models_have_the_published_sizes(mixture, llm):
    parameters, width, vocabulary = LANGUAGE_MODELS[llm]
    config = build_config(load_model_spec(MODELS / f"eagle-{mixture}-{llm}.yaml"), vocabulary)
    with torch.device("meta"):
        model = build_model(config, dtype=torch.bfloat16)
    vision = model.model.vision_tower
    names = [name for name in EXPERTS if name != "sam" or mixture == "x5"]
    assert list(vision.towers) == names
    for name in names:
        assert count(vision.towers[name]) / 1e6 == pytest.approx(EXPERTS[name], abs=0.06), name
    if mixture == "x5":
        assert count(vision.towers) / 1e9 == pytest.approx(2.27, abs=0.005)
    assert vision.fusion.out_channels == CHANNELS[mixture]
    projector = (CHANNELS[mixture] + 1) * width + (width + 1) * width
    assert count(model.model.multi_modal_projector) == projector
    assert config.num_image_tokens == 1024
    # `<image>` is one token more than the vocabulary, which grows by 64 rows for it
    assert config.text_config.vocab_size == vocabulary + 64
    grown = 2 * 64 * width
    assert count(model.model.language_model) + count(model.lm_head) == parameters + grown


def test_full_size_experts_see_what_the_official_release_shows_them():
    experts = build_config(
        load_model_spec(MODELS / "eagle-x5-vicuna-7b.yaml"), 32_000
    ).vision_config.expert_specs
    sizes = {spec.name: spec.view.size for spec in experts}
    assert sizes == {"clip": 336, "convnext": 1024, "sam": 1024, "eva02": 1024, "pix2struct": 720}
    for spec in experts:
        assert spec.view.mean == CLIP_MEAN
    clip = experts[0]
    assert (clip.view.interpolation, clip.view.align_corners) == ("bilinear", True)
    assert clip.arch["keep_cls"] is False


# Model files


def test_spec_errors_name_the_file_and_the_nearest_key(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("experts: [clip]\nlanguage_model: {checkpoint: a}\nconector: {kind: mlp}\n")
    with pytest.raises(ValueError, match=r'model.yaml: unknown key `conector`.*"connector"'):
        load_model_spec(path)
    path.write_text("experts: []\nlanguage_model: {checkpoint: a}\n")
    with pytest.raises(ValueError, match="model.yaml: `experts`"):
        load_model_spec(path)
    overrides = ["experts=[clip-tiny]", "canvas.size=64"]
    assert load_model_spec(path, overrides).canvas.size == 64


def test_a_language_model_needs_a_source():
    with pytest.raises(ValueError, match="give `checkpoint`, or both `config` and `tokenizer`"):
        spec(language_model={"config": LLAMA})
    assert (
        spec(language_model={"config": LLAMA, "tokenizer": "a"}).language_model.checkpoint is None
    )


def test_typos_in_kinds_are_explained():
    for changes, message in (
        ({"experts": ["clipp"]}, r'no expert "clipp".*Did you mean "clip"'),
        ({"fusion": {"kind": "chanel_concat"}}, r'no fusion of kind.*"channel_concat"'),
        ({"fusion": {"kind": "channel_concat", "gird": 4}}, r'unknown key `gird`.*"grid"'),
        ({"connector": {"kind": "mpl"}}, r'no connector of kind "mpl".*"mlp"'),
        ({"connector": {"depth": 1}}, "connector: give `kind`"),
        (
            {"language_model": {"checkpoint": "a", "config": {"model_type": "lama"}}},
            r'model_type: "lama".*Did you mean "llama"',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_config(spec(**changes), 3)


def test_vocabulary_grows_only_if_the_image_token_lies_beyond():
    assert build_config(spec(), 259).text_config.vocab_size == 260
    assert build_config(spec(), 260).text_config.vocab_size == 320


def test_tied_embeddings_follow_the_language_model():
    tied = {"checkpoint": "a", "config": {**LLAMA, "tie_word_embeddings": True}}
    model = build_model(build_config(spec(language_model=tied), 3))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_language_model_config_may_come_from_its_folder(tmp_path):
    LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}).save_pretrained(tmp_path)
    from_folder = build_config(spec(language_model={"checkpoint": str(tmp_path)}), 3)
    assert from_folder.text_config.hidden_size == 32
    with pytest.raises(ValueError, match=r"language_model.checkpoint: .*absent"):
        build_config(spec(language_model={"checkpoint": str(tmp_path / "absent")}), 3)


def test_tokenizer_and_processor(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    built = spec(language_model={"checkpoint": "a", "config": LLAMA, "tokenizer": str(tmp_path)})
    processor = build_processor(built, load_tokenizer(built))
    assert processor.image_seq_length == 16
    assert processor.image_token_id == 3
    assert processor.image_processor.fit == "crop"
    assert processor.image_processor.size.height == 64
    assert "USER: " in processor.chat_template
    with pytest.raises(ValueError, match=r"language_model.tokenizer: .*absent"):
        load_tokenizer(spec(language_model={"checkpoint": str(tmp_path / "absent")}))


def test_image_token_is_added_to_a_tokenizer_that_lacks_it(tmp_path):
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer.to_str().replace("<image>", "<spare>")
    tokenizer = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(backend), eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path)
    built = spec(language_model={"checkpoint": str(tmp_path), "config": LLAMA})
    processor = build_processor(built, load_tokenizer(built))
    assert processor.image_token_id == 260
    assert processor.tokenizer.pad_token == "</s>"
    assert build_config(built, 260).text_config.vocab_size == 320


# Strict loading


def test_load_model_takes_every_tensor(tiny_folder, tiny_model):
    loaded = load_model(tiny_folder, dtype=torch.float32)
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


@pytest.fixture
def spoiled(tiny_folder, tmp_path):
    """Copies the tiny model with its tensors changed by `edit`."""

    def spoil(edit) -> Path:
        for file in tiny_folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return spoil


BIAS = "model.multi_modal_projector.layers.0.bias"


def test_missing_unexpected_and_mismatched_tensors_are_named(spoiled):
    for edit, message in (
        (lambda t: t.pop(BIAS), f"missing: {BIAS}"),
        (lambda t: t.update(extra=torch.zeros(2)), "not part of this model: extra"),
        (lambda t: t.update({BIAS: torch.zeros(7)}), rf"of another shape.*{BIAS}.*7.*32"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(spoiled(edit))


def test_folders_that_hold_no_model(tmp_path, tiny_folder):
    with pytest.raises(ValueError, match="is not a model folder"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="absent"):
        load_model(tmp_path / "absent")
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path)
