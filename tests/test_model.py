"""Prompts and images in, logits and loss out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from eagle_moe.model import EagleMixForConditionalGeneration, EagleMixVisionModel
from tests.conftest import make_config
from tests.model_inputs import canvases, prompt


def as_llama(model: EagleMixForConditionalGeneration) -> LlamaForCausalLM:
    """The language model alone, as transformers has it."""
    llama = LlamaForCausalLM(model.config.text_config).eval()
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    return llama


def by_hand(model: EagleMixForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor):
    """Logits from the written-out recipe: resize, norm, concatenate, project, splice, Llama."""
    vision, llama = model.model.vision_tower, as_llama(model)
    columns = []
    for name, expert in vision.towers.items():
        map_ = F.interpolate(
            expert(expert.view(pixels)), (4, 4), mode="bilinear", align_corners=True
        )
        norm = vision.fusion.to_tokens.norms[name]
        tokens = map_.flatten(2).transpose(1, 2)
        columns.append(F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias))
    first, _, second = model.model.multi_modal_projector.layers
    image = F.linear(torch.cat(columns, -1), first.weight, first.bias)
    image = F.linear(F.gelu(image), second.weight, second.bias).flatten(0, 1)
    embeds = llama.model.embed_tokens(ids)
    rows = iter(image)
    for i, token in enumerate(ids[0].tolist()):
        if token == 3:
            embeds[0, i] = next(rows)
    return llama(inputs_embeds=embeds).logits


@torch.no_grad()
def test_forward_is_the_written_out_recipe(tiny_model):
    ids, pixels = prompt(1, 40, "image", 50, "image", 60), canvases(2)
    logits = tiny_model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits, by_hand(tiny_model, ids, pixels), rtol=1e-4, atol=1e-4)
    # The comparison must see a mistake: images in the wrong order.
    wrong = by_hand(tiny_model, ids, pixels.flip(0))
    assert (logits - wrong).abs().max() > 0.1


@torch.no_grad()
def test_text_only_skips_the_experts_and_is_the_plain_llm(tiny_model, monkeypatch):
    monkeypatch.setattr(EagleMixVisionModel, "encode", lambda *_: pytest.fail("experts were run"))
    ids = prompt(1, 40, 41, 42)
    expected = as_llama(tiny_model)(ids).logits
    for no_images in (None, canvases(0)):
        logits = tiny_model(input_ids=ids, pixel_values=no_images).logits
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(("images", "features"), [(1, 16), (3, 48)])
def test_mismatch_names_both_numbers(tiny_model, images, features):
    with pytest.raises(ValueError, match=rf"32 image placeholder.*give {features} \(16 each\)"):
        tiny_model(input_ids=prompt(1, "image", 9, "image"), pixel_values=canvases(images))


def test_placeholders_without_images_are_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"16 image placeholder.*give 0 \(16 each\)"):
        tiny_model(input_ids=prompt(1, "image", 9))


def test_one_source_of_text_and_of_images(tiny_model):
    ids, pixels = prompt(1, "image"), canvases(1)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        tiny_model(pixel_values=pixels)
    encoded = {"image": tiny_model.get_image_features(pixels)}
    with pytest.raises(ValueError, match="either pixel_values or mm_encoder_outputs"):
        tiny_model(input_ids=ids, pixel_values=pixels, mm_encoder_outputs=encoded)


@torch.no_grad()
def test_precomputed_features_and_embeddings_equal_pixels(tiny_model):
    ids, pixels = prompt(1, 40, "image", 9), canvases(1)
    expected = tiny_model(input_ids=ids, pixel_values=pixels).logits
    encoded = {"image": tiny_model.get_image_features(pixels)}
    embeds = tiny_model.get_input_embeddings()(ids)
    for inputs in (
        {"input_ids": ids, "mm_encoder_outputs": encoded},
        {"inputs_embeds": embeds, "mm_encoder_outputs": encoded},
        {"inputs_embeds": embeds, "pixel_values": pixels},
    ):
        torch.testing.assert_close(tiny_model(**inputs).logits, expected)


@torch.no_grad()
def test_logits_to_keep(tiny_model):
    inputs = {"input_ids": prompt(1, "image", 9, 8, 7), "pixel_values": canvases(1)}
    every = tiny_model(**inputs).logits
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=2).logits, every[:, -2:])
    places = torch.tensor([0, 17])
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=places).logits, every[:, places])


def test_loss_is_next_token_cross_entropy_over_kept_labels(tiny_model):
    ids = prompt(1, "image", 50, 60, 70)
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    inputs = {"input_ids": ids, "pixel_values": canvases(1), "labels": labels}
    output = tiny_model(**inputs)
    expected = F.cross_entropy(output.logits[0, -3:-1], ids[0, -2:])
    torch.testing.assert_close(output.loss, expected)
    scaled = tiny_model(**inputs, num_items_in_batch=torch.tensor(8)).loss
    torch.testing.assert_close(scaled, expected * 2 / 8)


def test_outputs_as_tuple(tiny_model):
    inputs = {"input_ids": prompt(1, "image"), "pixel_values": canvases(1)}
    output = tiny_model(**inputs, return_dict=False)
    torch.testing.assert_close(output[0], tiny_model(**inputs).logits)


@torch.no_grad()
def test_attention_implementation_reaches_the_llm(tiny_folder, tiny_model):
    eager = EagleMixForConditionalGeneration.from_pretrained(
        tiny_folder, attn_implementation="eager"
    )
    assert eager.model.language_model.config._attn_implementation == "eager"
    assert tiny_model.model.language_model.config._attn_implementation == "sdpa"
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    expected = tiny_model(**inputs).logits
    torch.testing.assert_close(eager(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_llms_that_bend_their_logits_are_refused():
    with pytest.raises(ValueError, match=r"gemma2 .*final_logit_softcapping=30"):
        EagleMixForConditionalGeneration(make_config(text_config={"model_type": "gemma2"}))


def test_what_transformers_and_engines_look_up(tiny_model):
    base = tiny_model.model
    assert tiny_model.base_model is base
    assert tiny_model.get_decoder() is base.language_model
    assert base.get_decoder() is base.language_model
    assert base.get_encoder(modality="image") is base.vision_tower
    assert base.vision_tower.get_input_embeddings() is None
    assert tiny_model.get_output_embeddings() is tiny_model.lm_head
    assert {"CLIPExpert", "CLIPEncoderLayer", "LlamaDecoderLayer"} <= tiny_model._no_split_modules
    # Serving engines take "moe" in a class name, or a submodule `experts`, for a sparse MoE.
    assert "moe" not in type(tiny_model).__name__.lower()
    assert not any(name.endswith("experts") for name, _ in tiny_model.named_modules())
    assert not any(b.numel() and n.endswith("experts") for n, b in tiny_model.named_buffers())
