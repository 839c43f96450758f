"""`open_clip:` experts against open_clip's own towers, and what a wrong name says."""

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower

from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.experts.check import distance
from tests.parity import randomise

SMALL = {"layers": 2, "width": 64, "head_width": 16}


@torch.no_grad()
def test_transformer_tower():
    config = {**open_clip.get_model_config("ViT-B-32")["vision_cfg"], "image_size": 64, **SMALL}
    theirs = randomise(_build_vision_tower(32, config, quick_gelu=True))
    seen = []
    theirs.transformer.resblocks[-1].register_forward_hook(lambda m, i, out: seen.append(out))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    theirs(pixels)
    expected = seen[0][:, 1:].transpose(1, 2).unflatten(2, (2, 2))
    entry = {"kind": "open_clip:ViT-B-32:openai", "view": {"size": 64}}
    for quick_gelu in (True, False):
        arch = {"quick_gelu": quick_gelu, "options": SMALL}
        expert = build_expert(resolve_expert({**entry, "arch": arch})).eval()
        assert not expert.body.load_state_dict(theirs.state_dict(), strict=False).missing_keys
        assert (distance(expert(pixels), expected) < 1e-5) == quick_gelu


def test_weights_decide_the_view_and_the_activation():
    openai = resolve_expert("open_clip:ViT-B-32:openai")
    laion = resolve_expert("open_clip:ViT-B-32:laion2b_s34b_b79k")
    assert openai.arch["quick_gelu"]
    assert not laion.arch["quick_gelu"]
    assert laion.card.checkpoint == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert resolve_expert("open_clip:ViT-B-16-SigLIP").view.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("model", "options", "channels", "stride"),
    [
        ("coca_ViT-B-32", SMALL, 64, 32),  # pooled by attention, which has no place in a map
        ("RN50", {"layers": [1, 1, 1, 1], "width": 8}, 256, 32),
        ("ViT-B-16-SigLIP", {"timm_model_name": "vit_tiny_patch16_224"}, 192, 16),
    ],
)
def test_every_parameter_of_every_tower_learns(model, options, channels, stride):
    entry = {
        "kind": f"open_clip:{model}",
        "view": {"size": 64},
        "arch": {"options": options},
    }
    expert = build_expert(resolve_expert(entry))
    seen = expert(torch.randn(2, 3, 64, 64))
    assert seen.shape == (2, channels, 64 // stride, 64 // stride)
    (seen * torch.randn_like(seen)).sum().backward()
    assert not [n for n, p in expert.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("open_clip:ViT-B-33", 'Did you mean "ViT-B-32"'),
        ("open_clip:ViT-B-32:laion3b", 'no weights "laion3b" of ViT-B-32'),
        ({"kind": "open_clip:ViT-B-32", "view": {"size": 100}}, "view.size 100 is not a multiple"),
        ({"kind": "open_clip:ViT-B-32", "arch": {"options": {"layer": 2}}}, "arch.options.*layer"),
    ],
)
def test_bad_input(entry, message):
    with pytest.raises(ValueError, match=message):
        build_expert(resolve_expert(entry))
