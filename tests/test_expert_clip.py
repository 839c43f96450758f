"""CLIP against transformers' own CLIPVisionModel."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.experts.check import distance
from tests.parity import randomise

ARCH = {"hidden_size": 48, "heads": 4, "layers": 3, "mlp_size": 80}


@pytest.fixture(scope="module")
def theirs():
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
        attn_implementation="eager",
    )
    return randomise(CLIPVisionModel(config))


def ours(theirs, **arch):
    entry = {"preset": "clip-tiny", "arch": {**ARCH, "keep_cls": True, **arch}}
    expert = build_expert(resolve_expert(entry))
    state = {}
    for key, value in theirs.state_dict().items():
        key = key.removeprefix("vision_model.").removeprefix("encoder.")
        key = key.replace("embeddings.", "").replace("pre_layrnorm", "pre_layernorm")
        key = key.replace("position_embedding.weight", "position_embedding")
        if not key.startswith("post_layernorm"):
            state[key] = value
    expert.load_state_dict(state)
    return expert.eval()


@torch.no_grad()
def test_equals_transformers(theirs):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    hidden = theirs(pixels, output_hidden_states=True).hidden_states[-1]
    expected = hidden[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    assert distance(ours(theirs)(pixels), expected) < 1e-5
    assert distance(ours(theirs, activation="gelu")(pixels), expected) > 1e-3  # a mistake


def test_without_cls_has_no_cls_parameters():
    spec = resolve_expert({"preset": "clip-tiny", "arch": {"keep_cls": False}})
    names = dict(build_expert(spec).named_parameters())
    assert "class_embedding" not in names
    assert names["position_embedding"].shape == (64, 96)
