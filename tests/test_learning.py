from __future__ import annotations

import copy

import pytest
import torch

from eagle_moe.experts.registry import presets
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import expert_part, expert_prefix, part_of
from tests.conftest import make_config, make_model
from train.learning import (
    block_depths,
    frozen_modules,
    learning_names,
    learning_parts,
    open_parts,
    parameter_groups,
)

EXPERTS = ("clip", "convnext")


@pytest.fixture
def model(tiny_model: EagleMixForConditionalGeneration) -> EagleMixForConditionalGeneration:
    return copy.deepcopy(tiny_model).requires_grad_(False)


def test_opening_parts_opens_these_alone(model: EagleMixForConditionalGeneration) -> None:
    open_parts(model, ["experts.clip", "connector"])
    assert learning_parts(model) == {"experts.clip", "connector"}
    expected = {n for n, _ in model.named_parameters() if part_of(n) in learning_parts(model)}
    assert learning_names(model) == expected


def test_frozen_modules_are_those_in_which_nothing_learns(
    model: EagleMixForConditionalGeneration,
) -> None:
    open_parts(model, ["experts.clip"])
    frozen = {id(parameter) for m in frozen_modules(model) for parameter in m.parameters()}
    assert frozen == {
        id(value) for name, value in model.named_parameters() if part_of(name) != "experts.clip"
    }


def test_groups_hold_each_learning_parameter_once_with_its_rate_and_decay(
    model: EagleMixForConditionalGeneration,
) -> None:
    open_parts(model, ["experts.clip", "language_model"])
    decayed = [name for name, value in model.named_parameters() if value.dim() > 1]
    rates = {"experts.clip": 1e-5, "language_model": 1e-3}
    weight_decays = {"experts.clip": 0.1, "language_model": 0.3}
    groups = parameter_groups(model, rates, weight_decays, decayed)
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = (group["part"], group["lr"], group["weight_decay"])
    assert seen == {
        id(value): (
            part_of(name),
            rates[part_of(name)],
            weight_decays[part_of(name)] if name in decayed else 0.0,
        )
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def test_layer_decay_lowers_the_rate_block_by_block(
    model: EagleMixForConditionalGeneration,
) -> None:
    open_parts(model, ["experts.clip", "language_model"])
    rates = {"experts.clip": 1.0, "language_model": 1.0}
    decays = dict.fromkeys(rates, 0.0)
    groups = parameter_groups(model, rates, decays, [], {"experts.clip": 0.5})
    rate = {id(value): group["lr"] for group in groups for value in group["params"]}
    clip = model.model.vision_tower.towers["clip"]
    named = dict(clip.named_parameters())
    seen = {
        name.split(".")[1] if "layers" in name else name: rate[id(named[name])] for name in named
    }
    assert seen == {  # three layers
        "2": 1.0,
        "1": 0.5,
        "0": 0.25,
        **dict.fromkeys(
            (
                "patch_embedding.weight",
                "position_embedding",
                "pre_layernorm.weight",
                "pre_layernorm.bias",
            ),
            0.125,
        ),
    }
    assert {rate[id(v)] for v in model.model.language_model.parameters()} == {1.0}


def test_a_language_models_head_is_at_the_top_and_its_embeddings_at_the_bottom(
    model: EagleMixForConditionalGeneration,
) -> None:
    depths = block_depths(model, "language_model")
    assert depths["model.language_model.embed_tokens.weight"] == 2
    assert depths["model.language_model.layers.0.mlp.up_proj.weight"] == 1
    assert depths["model.language_model.layers.1.self_attn.q_proj.weight"] == 0
    assert depths["model.language_model.norm.weight"] == depths["lm_head.weight"] == 0


@pytest.mark.parametrize("preset", sorted(name for name in presets() if name.endswith("-tiny")))
def test_every_expert_is_registered_in_the_order_in_which_it_computes(preset: str) -> None:
    """Depths go by that order: they never rise on the way from the pixels to the map."""
    model = make_model(make_config((preset,)))
    (expert,) = model.model.vision_tower.towers.values()
    depths = block_depths(model, expert_part(expert.spec.name))
    used: dict[str, None] = {}
    for name, module in expert.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: used.setdefault(name))
    expert(expert.view(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    prefix = expert_prefix(expert.spec.name)
    found = [
        depths[prefix + f"{name}.{key}".lstrip(".")]
        for name in used
        for key, _ in expert.get_submodule(name).named_parameters(recurse=False)
    ]
    assert found == sorted(found, reverse=True)
    assert set(depths.values()) >= set(range(len(expert.blocks)))
