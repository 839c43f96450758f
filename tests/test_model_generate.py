"""`generate`, with images."""

from __future__ import annotations

import copy

import pytest
import torch

from eagle_moe.model import EagleMixVisionModel
from tests.conftest import make_config, make_model
from tests.model_inputs import TINY, TOKENS, canvases, prompt

GENERATE = {"max_new_tokens": 6, "do_sample": False}


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}],
)
def test_any_cache_gives_the_same_tokens(tiny_model, options):
    inputs = {"input_ids": prompt(1, "image", 9, "image", 8), "pixel_values": canvases(2)}
    expected = tiny_model.generate(**inputs, **GENERATE)
    assert torch.equal(tiny_model.generate(**inputs, **GENERATE, **options), expected)


@torch.no_grad()
def test_generate_looks_once_and_keeps_one_row_of_logits(tiny_model, monkeypatch):
    looks, rows = [], []
    encode = EagleMixVisionModel.encode
    monkeypatch.setattr(
        EagleMixVisionModel, "encode", lambda *args: looks.append(1) or encode(*args)
    )
    hook = tiny_model.lm_head.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
    inputs = {"input_ids": prompt(1, "image", 9), "pixel_values": canvases(1)}
    tiny_model.generate(**inputs, **GENERATE)
    hook.remove()
    assert looks == [1]
    assert set(rows) == {1}


@torch.no_grad()
def test_placeholders_are_never_generated(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.lm_head.weight[3] = 50 * model.lm_head.weight.abs().max()
    ids = prompt(1, "image", 9)
    for sign in (1, -1):
        model.lm_head.weight[3] *= sign
        tokens = model.generate(input_ids=ids, pixel_values=canvases(1), **GENERATE)
        assert 3 not in tokens[0, ids.shape[1] :]


@torch.no_grad()
def test_beams_carry_their_own_images(tiny_model):
    ids = torch.cat([prompt(1, "image", 9), prompt(1, "image", 70)])
    options = {**GENERATE, "num_beams": 2}
    together = tiny_model.generate(input_ids=ids, pixel_values=canvases(2), **options)
    for i, pixels in enumerate(canvases(2).split(1)):
        alone = tiny_model.generate(input_ids=ids[i : i + 1], pixel_values=pixels, **options)
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("preset", TINY)
def test_any_expert_alone_makes_a_model(preset):
    model = make_model(make_config((preset,)))
    tokens = model.generate(
        input_ids=prompt(1, "image", 9), pixel_values=canvases(1), max_new_tokens=2
    )
    assert tokens.shape[1] == TOKENS + 4
