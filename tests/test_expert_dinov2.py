"""DINOv2 against transformers' models, with registers and without."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.experts.check import distance
from tests.parity import randomise

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 64,
    "patch_size": 8,
    "attn_implementation": "eager",
}


def ours(theirs, size, **arch):
    base = {"hidden_size": 48, "heads": 4, "mlp_ratio": 2, "image_size": 64, "patch_size": 8}
    entry = {"preset": "dinov2-tiny", "view": {"size": size}, "arch": {**base, **arch}}
    expert = build_expert(resolve_expert(entry))
    state = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("encoder.layer.", "layers.").replace("embeddings.patch_embeddings.", "")
        key = key.removeprefix("embeddings.").replace("projection.", "patch_embedding.")
        if key in ("cls_token", "register_tokens", "position_embeddings"):
            value = value.squeeze()
        if key != "mask_token":
            state[key] = value
    expert.load_state_dict(state)
    return expert.eval()


@torch.no_grad()
def test_with_registers():
    config = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
    theirs = randomise(Dinov2WithRegistersModel(config))
    for size in (64, 48):  # 48: the position table is resampled, with antialiasing
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        hidden = theirs(pixels).last_hidden_state[:, 4:]
        expected = hidden.transpose(1, 2).unflatten(2, (size // 8, size // 8))
        assert distance(ours(theirs, size, registers=3)(pixels), expected) < 1e-5
    mistake = ours(theirs, 48, registers=3, antialias=False)
    assert distance(mistake(pixels), expected) > 1e-3


@torch.no_grad()
def test_without_registers():
    for swiglu in (False, True):
        theirs = randomise(Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=swiglu)))
        pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
        expected = theirs(pixels).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
        expert = ours(theirs, 48, registers=0, antialias=False, swiglu=swiglu)
        assert distance(expert(pixels), expected) < 1e-5
