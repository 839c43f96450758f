from __future__ import annotations

import json

import pytest

from eagle_moe.config import EagleMixConfig, EagleMixVisionConfig
from eagle_moe.experts import presets
from tests.conftest import make_config


def test_json_round_trip(tiny_config, tmp_path):
    again = EagleMixConfig(**json.loads(tiny_config.to_json_string()))
    assert again.to_dict() == tiny_config.to_dict()
    tiny_config.save_pretrained(tmp_path)
    assert EagleMixConfig.from_pretrained(tmp_path).to_dict() == tiny_config.to_dict()


def test_a_checkpoint_keeps_every_resolved_option(tiny_config):
    """A preset may change later; what was built from it must not."""
    saved = json.loads(tiny_config.to_json_string())
    experts = saved["vision_config"]["experts"]
    assert [entry["name"] for entry in experts] == ["clip", "convnext"]
    for entry in experts:
        assert set(entry) == {"name", "kind", "view", "arch", "card"}
        assert entry["arch"]
    assert saved["vision_config"]["fusion"]["align_corners"] is True
    assert saved["connector"] == {"kind": "mlp", "depth": 2}


@pytest.mark.parametrize(
    ("kind", "experts", "tokens"),
    [
        ("channel_concat", ("clip-tiny", "sam-tiny"), 25),
        ("sequence_append", ("clip-tiny", "sam-tiny"), 50),
        ("sequence_append", ("sam-tiny",), 25),
    ],
)
def test_tokens_per_image(kind, experts, tokens):
    vision = {"experts": list(experts), "fusion": {"kind": kind, "grid": 5}}
    config = make_config(vision_config=vision)
    assert config.vision_config.num_tokens == tokens
    assert config.num_image_tokens == tokens


def test_engines_find_what_they_look_for(tiny_config):
    assert tiny_config.get_text_config() is tiny_config.text_config
    assert tiny_config.text_config is not tiny_config
    saved = tiny_config.to_dict()
    vocabularies = [key for key in saved if "vocab_size" in key]
    assert vocabularies == []  # vLLM takes any table of such a size for the word embeddings


def test_experts_are_named_once():
    with pytest.raises(ValueError, match=r"names must be unique.*Give each a `name`"):
        EagleMixVisionConfig(experts=["clip-tiny", "clip-tiny"])
    twice = EagleMixVisionConfig(experts=["clip-tiny", {"preset": "clip-tiny", "name": "second"}])
    assert [spec.name for spec in twice.expert_specs] == ["clip", "second"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "lama"}}, 'no model_type "lama"'),
        ({"connector": {"kind": "mlp", "deep": 3}}, r"connector: unknown key `deep`"),
        ({"vision_config": {"fusion": {"grid": 3}}}, "fusion: give `kind`"),
        ({"vision_config": {"experts": ["samm"]}}, r'no expert "samm"\. Did you mean "sam"'),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_every_preset_resolves_and_survives_json():
    for name in presets():
        config = EagleMixVisionConfig(experts=[name])
        again = EagleMixVisionConfig(**json.loads(config.to_json_string()))
        assert again.expert_specs == config.expert_specs
