"""Weights: drawn, saved, loaded, in which dtype."""

from __future__ import annotations

import copy

import pytest
import torch

from eagle_moe.model import EagleMixForConditionalGeneration
from tests.conftest import make_config, make_model
from tests.model_inputs import TINY, canvases, prompt

TIMM_EVA02 = {  # rotary tables and a zero key bias, in buffers that are not saved
    "kind": "timm:eva02_tiny_patch14_224",
    "name": "eva",
    "view": {"size": 56},
    "arch": {"options": {"depth": 1, "img_size": 56}},
}


@torch.no_grad()
@pytest.mark.parametrize("experts", [TINY, (TIMM_EVA02,)], ids=["ours", "timm"])
def test_saved_and_loaded_models_are_equal_to_the_last_buffer(tmp_path, experts):
    model = make_model(make_config(experts))
    model.save_pretrained(tmp_path)
    loaded, report = EagleMixForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    for kind in ("named_parameters", "named_buffers", "named_non_persistent_buffers"):
        expected, actual = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_missing_weights_are_drawn_by_the_owners_rule(tmp_path):
    """transformers draws what a checkpoint lacks; the expert's own rule must decide how."""
    model = make_model(make_config(TINY))
    model.save_pretrained(
        tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "towers" not in k}
    )
    loaded = EagleMixForConditionalGeneration.from_pretrained(tmp_path)
    for name, expert in loaded.model.vision_tower.towers.items():
        for part, value in [*expert.named_parameters(), *expert.named_buffers()]:
            assert value.isfinite().all(), f"{name}.{part}"
    projection = loaded.model.vision_tower.towers["clip"].layers[0].mlp.fc1.weight
    bound = (6 / sum(projection.shape)) ** 0.5  # Xavier's, not a normal of 0.02
    assert 0.9 * bound < projection.abs().max() <= bound
    kept = loaded.model.multi_modal_projector.layers[0].weight
    assert torch.equal(kept, model.model.multi_modal_projector.layers[0].weight)


def test_fresh_connectors_are_drawn_as_nn_linear(tiny_config):
    torch.manual_seed(0)
    fresh = EagleMixForConditionalGeneration(tiny_config).model.multi_modal_projector.layers[0]
    bound = fresh.in_features**-0.5
    assert 0.9 * bound < fresh.weight.abs().max() <= bound


def test_built_on_meta_without_touching_memory():
    with torch.device("meta"):
        model = EagleMixForConditionalGeneration(make_config(TINY))
    assert {p.device.type for p in model.parameters()} == {"meta"}


@torch.no_grad()
def test_bf16(tiny_folder, tiny_model):
    model = EagleMixForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids, pixels = prompt(1, "image", 9), canvases(1)
    views = {n: e.view(pixels) for n, e in model.model.vision_tower.towers.items()}
    exact = {n: e.view(pixels) for n, e in tiny_model.model.vision_tower.towers.items()}
    for name, view in views.items():  # low precision starts after normalisation
        assert torch.equal(view, exact[name].bfloat16())
    logits = model(input_ids=ids, pixel_values=pixels).logits
    expected = tiny_model(input_ids=ids, pixel_values=pixels).logits
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_parts_may_differ_in_dtype(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.model.vision_tower.towers.bfloat16()
    model(input_ids=prompt(1, "image"), pixel_values=canvases(1))
    model.model.language_model.bfloat16(), model.lm_head.bfloat16()
    model(input_ids=prompt(1, "image"), pixel_values=canvases(1))


@torch.no_grad()
@pytest.mark.parametrize(
    "text_config",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ],
)
def test_any_causal_llm_with_tied_embeddings(tmp_path, text_config):
    config = make_config(text_config={**text_config, "vocab_size": 260}, tie_word_embeddings=True)
    model = make_model(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = EagleMixForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
