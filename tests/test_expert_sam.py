"""SAM against the segment-anything package: forward and gradients."""

import pytest
import torch

from eagle_moe.experts import build_expert, resolve_expert, sam
from eagle_moe.experts.check import distance
from tests.parity import randomise
from tests.upstream_models import sam_encoder

pytest.importorskip("segment_anything")


@pytest.fixture(scope="module")
def theirs():
    return randomise(sam_encoder())


def ours(theirs):
    arch = {
        "image_size": 80,
        "hidden_size": 48,
        "heads": 4,
        "mlp_size": 96,
        "global_layers": [1],
        "neck": "original",
        "neck_channels": 16,
    }
    entry = {"preset": "sam-tiny", "view": {"size": 80}, "arch": arch}
    expert = build_expert(resolve_expert(entry))
    neck = {"0": "conv1", "1": "norm1", "2": "conv2", "3": "norm2"}
    state = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("patch_embed.proj", "patch_embed").replace("blocks.", "layers.")
        if key.startswith("neck."):
            _, index, name = key.split(".")
            key = f"neck.{neck[index]}.{name}"
        state[key] = value.flatten(0, 2) if key == "pos_embed" else value
    expert.load_state_dict(state)
    return expert.eval()


def test_equals_segment_anything(theirs):
    expert = ours(theirs)
    pixels = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    expected, seen = theirs(pixels), expert(pixels)
    assert distance(seen, expected) < 1e-5
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (seen * weight).sum().backward()
    for mine, other in zip(expert.layers, theirs.blocks, strict=True):
        for name in ("rel_pos_h", "rel_pos_w", "qkv.weight"):
            grads = [block.attn.get_parameter(name).grad for block in (mine, other)]
            assert distance(*grads) < 1e-4, name


@torch.no_grad()
def test_mistake_window_padding_before_the_norm(theirs, monkeypatch):
    """Padding that goes through the norm is no longer zero: the output shows it."""
    expert = ours(theirs)
    pixels = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixels)
    pad = sam.ViTDetBlock.forward.__globals__["F"].pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, sides: pad(x, sides, value=0.1))
    assert distance(expert(pixels), expected) > 1e-2


def test_necks_publish_their_channels():
    for neck, unshuffle, channels, stride in (
        ("short", 1, 48, 8),
        ("short", 2, 192, 16),
        ("none", 1, 96, 8),
    ):
        entry = {"preset": "sam-tiny", "arch": {"neck": neck, "unshuffle": unshuffle}}
        expert = build_expert(resolve_expert(entry))
        assert (expert.channels, expert.stride) == (channels, stride)
        assert expert(torch.randn(1, 3, 64, 64)).shape == (1, channels, 64 // stride, 64 // stride)


def test_view_must_be_whole_folded_cells():
    entry = {"preset": "sam-tiny", "view": {"size": 72}, "arch": {"unshuffle": 2}}
    with pytest.raises(ValueError, match="view.size 72 is not a multiple of 16"):
        build_expert(resolve_expert(entry))
