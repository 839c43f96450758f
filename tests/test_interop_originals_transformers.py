"""Folders of transformers: CLIP, SAM, Pix2Struct and DINOv2, against that library's forward."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    PreTrainedModel,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
)

from eagle_moe.interop.originals import find_original
from tests.originals import as_map, distance, load, pixels, spec_of, swap_in_file
from tests.parity import randomise

WEIGHTS = "model.safetensors"


def saved(model: PreTrainedModel, folder: Path, **options) -> PreTrainedModel:
    randomise(model).save_pretrained(folder, **options)
    return model


# CLIP

CLIP = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def clip_spec(size=32, **arch):
    base = {"hidden_size": 48, "mlp_size": 80, "layers": 2, "heads": 4}
    return spec_of("clip", size, **{**base, "image_size": 32, "patch_size": 4, **arch})


def clip_map(model, size=32):
    hidden = model(pixels(size), output_hidden_states=True).hidden_states[-1]
    return as_map(hidden)


@torch.no_grad()
def test_clip_vision_model(tmp_path):
    theirs = saved(CLIPVisionModel(CLIPVisionConfig(**CLIP)), tmp_path)
    assert distance(load(clip_spec(), tmp_path)(pixels(32)), clip_map(theirs)) < 1e-5
    first = "encoder.layers.0.self_attn"
    swap_in_file(tmp_path / WEIGHTS, f"{first}.q_proj.weight", f"{first}.v_proj.weight")
    assert distance(load(clip_spec(), tmp_path)(pixels(32)), clip_map(theirs)) > 1e-2


@torch.no_grad()
def test_clip_with_its_text_tower_in_shards(tmp_path):
    theirs = CLIPModel(CLIPConfig(vision_config=CLIP, text_config=TEXT))
    saved(theirs, tmp_path, max_shard_size="100KB")
    assert len(find_original(clip_spec(), tmp_path).shards) > 1
    expected = clip_map(theirs.vision_model)
    assert distance(load(clip_spec(), tmp_path)(pixels(32)), expected) < 1e-5


@torch.no_grad()
def test_clip_as_older_releases_saved_it(tmp_path):
    theirs = saved(CLIPVisionModel(CLIPVisionConfig(**CLIP)), tmp_path)
    tensors = {f"vision_model.{k}": v for k, v in load_file(tmp_path / WEIGHTS).items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(65)[None]
    (tmp_path / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert distance(load(clip_spec(), tmp_path)(pixels(32)), clip_map(theirs)) < 1e-5


@torch.no_grad()
def test_clip_without_its_cls_at_another_size(tmp_path):
    """`arch` decides what is taken; the view may be any."""
    theirs = saved(CLIPVisionModel(CLIPVisionConfig(**CLIP)), tmp_path)
    kept, dropped = (load(clip_spec(48, keep_cls=keep), tmp_path) for keep in (True, False))
    assert dropped.position_embedding.shape == (64, 48)
    assert torch.equal(dropped.position_embedding, kept.position_embedding[1:])
    table = theirs.embeddings.position_embedding.weight
    assert torch.equal(kept.position_embedding, table)
    plan = find_original(clip_spec(keep_cls=False), tmp_path).plan()
    assert "keep_cls: false" in plan.ignored["embeddings.class_embedding"]
    assert distance(kept(pixels(48)), dropped(pixels(48))) > 1e-2


# SAM

SAM = {
    "hidden_size": 48,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 80,
    "patch_size": 8,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 96,
}


def sam_spec(**arch):
    base = {"hidden_size": 48, "mlp_size": 96, "layers": 3, "heads": 4, "neck_channels": 16}
    sizes = {"image_size": 80, "patch_size": 8, "window": 4, "global_layers": [1], "unshuffle": 1}
    return spec_of("sam", 80, **{**base, **sizes, "neck": "original", **arch})


def sam_model():
    small = {"hidden_size": 8, "image_size": 80, "patch_size": 8}
    decoder = {"hidden_size": 8, "mlp_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SamConfig(vision_config=SAM, prompt_encoder_config=small, mask_decoder_config=decoder)
    return SamModel(config)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: SamVisionModel(SamVisionConfig(**SAM)), sam_model])
def test_sam(tmp_path, make):
    theirs = saved(make(), tmp_path)
    expected = theirs.vision_encoder(pixels(80)).last_hidden_state
    assert distance(load(sam_spec(), tmp_path)(pixels(80)), expected) < 1e-5
    one, other = (f"vision_encoder.layers.1.attn.rel_pos_{axis}" for axis in "hw")
    swap_in_file(tmp_path / WEIGHTS, one, other)
    assert distance(load(sam_spec(), tmp_path)(pixels(80)), expected) > 1e-2


@torch.no_grad()
def test_sams_short_neck_is_the_first_half_of_its_own(tmp_path):
    theirs = saved(SamVisionModel(SamVisionConfig(**SAM)), tmp_path)
    encoder = theirs.vision_encoder
    hidden = []
    encoder.layers[-1].register_forward_hook(lambda m, i, out: hidden.append(out))
    theirs(pixels(80))
    last = (hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]).permute(0, 3, 1, 2)
    half = encoder.neck.layer_norm1(encoder.neck.conv1(last))
    assert distance(load(sam_spec(neck="short"), tmp_path)(pixels(80)), half) < 1e-5
    assert distance(load(sam_spec(neck="none"), tmp_path)(pixels(80)), last) < 1e-5
    plan = find_original(sam_spec(neck="short"), tmp_path).plan()
    assert "arch.neck: short" in plan.ignored["vision_encoder.neck.conv2.weight"]


# Pix2Struct

PIX = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "d_kv": 8,
    "d_ff": 64,
    "seq_len": 12,
}


def pix_spec(**arch):
    base = {"hidden_size": 48, "layers": 2, "heads": 4, "head_dim": 8, "mlp_size": 64}
    return spec_of("pix2struct", 64, **{**base, "table_size": 12, **arch})


def pix_map(encoder, expert, canvas):
    """What the encoder makes of the patches that our expert cuts."""
    patches = expert.patches(expert.view(canvas))
    ids = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).expand(len(canvas), -1, -1)
    return as_map(encoder(torch.cat([ids, patches], dim=-1)).last_hidden_state, prefix=0)


def pix_model():
    text = {"hidden_size": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    text |= {"vocab_size": 20, "encoder_hidden_size": 48}
    return Pix2StructForConditionalGeneration(Pix2StructConfig(vision_config=PIX, text_config=text))


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (lambda: Pix2StructVisionModel(Pix2StructVisionConfig(**PIX)), ""),
        (pix_model, "encoder."),
    ],
)
def test_pix2struct(tmp_path, make, prefix):
    theirs = saved(make(), tmp_path)
    encoder = theirs.encoder if prefix else theirs
    expert = load(pix_spec(), tmp_path)
    canvas = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    canvas = canvas.to(torch.uint8)
    expected = pix_map(encoder, expert, canvas)
    assert distance(expert(expert.view(canvas)), expected) < 1e-5
    one, other = (f"{prefix}embeddings.{axis}_embedder.weight" for axis in ("row", "column"))
    swap_in_file(tmp_path / WEIGHTS, one, other)
    expert = load(pix_spec(), tmp_path)
    assert distance(expert(expert.view(canvas)), expected) > 1e-2


# DINOv2

DINO = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 64,
    "patch_size": 8,
}


def dino_spec(size, **arch):
    base = {"hidden_size": 48, "layers": 2, "heads": 4, "mlp_ratio": 2}
    return spec_of("dinov2", size, **{**base, "image_size": 64, "patch_size": 8, **arch})


@torch.no_grad()
def test_dinov2_with_registers(tmp_path):
    config = Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
    theirs = saved(Dinov2WithRegistersModel(config), tmp_path)
    expected = as_map(theirs(pixels(48)).last_hidden_state, prefix=4)
    spec = dino_spec(48, registers=3)
    assert distance(load(spec, tmp_path)(pixels(48)), expected) < 1e-5
    swap_in_file(
        tmp_path / WEIGHTS,
        "encoder.layer.0.layer_scale1.lambda1",
        "encoder.layer.1.layer_scale2.lambda1",
    )
    assert distance(load(spec, tmp_path)(pixels(48)), expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_without_registers(tmp_path, swiglu):
    theirs = saved(Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=swiglu)), tmp_path)
    expected = as_map(theirs(pixels(48)).last_hidden_state)
    spec = dino_spec(48, registers=0, antialias=False, swiglu=swiglu)
    assert distance(load(spec, tmp_path)(pixels(48)), expected) < 1e-5


# What the configuration says


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ({"heads": 3}, {}, r"arch.heads is 3, not 4 \(num_attention_heads\).*`arch: {heads: 4}`"),
        ({"activation": "gelu"}, {}, 'not quick_gelu.*`arch: {activation: "quick_gelu"}`'),
        ({"norm_eps": 1e-6}, {}, r"arch.norm_eps is 1e-06, not 1e-05 \(layer_norm_eps\)"),
        ({"layers": 3, "mlp_size": 9}, {}, "`arch: {layers: 2, mlp_size: 80}`"),
        ({}, {"model_type": "siglip"}, "a model of type siglip, but experts of kind `clip` start"),
        ({}, {"hidden_size": "wide"}, "hidden_size.*expected int"),
    ],
)
def test_a_configuration_that_disagrees(tmp_path, arch, change, message):
    saved(CLIPVisionModel(CLIPVisionConfig(**CLIP)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as error:
        find_original(clip_spec(**arch), tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_that_no_expert_computes(tmp_path):
    saved(SamVisionModel(SamVisionConfig(**SAM, hidden_act="relu")), tmp_path)
    with pytest.raises(ValueError, match="hidden_act is relu, but experts of kind `sam` compute"):
        find_original(sam_spec(), tmp_path)


def test_overlapping_patches_are_not_pix2structs(tmp_path):
    """Patches of 8 pixels that see 4 more on every side have the shape of those of 16."""
    saved(Pix2StructVisionModel(Pix2StructVisionConfig(**PIX)), tmp_path)
    with pytest.raises(ValueError, match="`arch: {patch_size: 16, overlap: 0}`"):
        find_original(pix_spec(patch_size=8, overlap=4), tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_configuration_that_is_not_there(tmp_path, text):
    saved(CLIPVisionModel(CLIPVisionConfig(**CLIP)), tmp_path)
    path = tmp_path / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=r"config.json.*(copy|Copy)"):
        find_original(clip_spec(), tmp_path / WEIGHTS)


def test_defaults_that_a_configuration_leaves_out_count(tmp_path):
    """transformers has written only what differs from its defaults."""
    saved(CLIPVisionModel(CLIPVisionConfig(**CLIP)), tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    del data["hidden_act"], data["layer_norm_eps"]
    path.write_text(json.dumps(data))
    assert find_original(clip_spec(), tmp_path).plan().placed
    with pytest.raises(ValueError, match="arch.activation is gelu"):
        find_original(clip_spec(activation="gelu"), tmp_path)


def test_a_tensor_too_many_and_a_tensor_too_few(tmp_path):
    saved(CLIPVisionModel(CLIPVisionConfig(**CLIP)), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["pre_layrnorm.weight"]
    tensors["encoder.lost"] = torch.zeros(3)
    save_file(tensors, tmp_path / WEIGHTS)
    message = r"CLIPVisionModel\): unknown keys: encoder.lost \[3\].\nnothing in the file for: pre_"
    with pytest.raises(ValueError, match=message):
        load(clip_spec(), tmp_path)
