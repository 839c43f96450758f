"""Pix2Struct against transformers' processor and encoder, padding and mask included."""

import pytest
import torch
from transformers import Pix2StructImageProcessor, Pix2StructVisionConfig, Pix2StructVisionModel

from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.experts.check import distance
from tests.parity import randomise

ARCH = {
    "patch_size": 16,
    "hidden_size": 48,
    "layers": 2,
    "heads": 4,
    "head_dim": 8,
    "mlp_size": 64,
    "table_size": 12,
}


@pytest.fixture(scope="module")
def theirs():
    config = Pix2StructVisionConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        d_kv=8,
        d_ff=64,
        seq_len=12,
        attn_implementation="eager",
    )
    return randomise(Pix2StructVisionModel(config))


def ours(theirs, size, **arch):
    entry = {"preset": "pix2struct-tiny", "view": {"size": size}, "arch": {**ARCH, **arch}}
    expert = build_expert(resolve_expert(entry))
    state = {
        key.removeprefix("embeddings.").replace("encoder.layer.", "layers."): value
        for key, value in theirs.state_dict().items()
    }
    expert.load_state_dict(state)
    return expert.eval()


@torch.no_grad()
def test_equals_transformers(theirs):
    """20 patches at most: 4 x 4 real ones and 4 of padding, which transformers masks."""
    canvas = torch.randint(0, 256, (3, 3, 90, 90), generator=torch.Generator().manual_seed(1))
    canvas = canvas.to(torch.uint8)
    processor = Pix2StructImageProcessor(max_patches=20, is_vqa=False)
    inputs = processor(list(canvas), return_tensors="pt")
    expert = ours(theirs, 64)
    patches = expert.patches(expert.view(canvas))
    # This processor divides the variance by n - 1; its older versions, the original and we by n.
    older = inputs["flattened_patches"][:, :16, 2:] * (1 - 1 / canvas[0].numel()) ** -0.5
    torch.testing.assert_close(patches, older)
    inputs["flattened_patches"][:, :16, 2:] = older
    hidden = theirs(**inputs).last_hidden_state[:, :16]
    expected = hidden.transpose(1, 2).unflatten(2, (4, 4))
    assert distance(expert(expert.view(canvas)), expected) < 1e-5
    for layer in expert.layers:  # a mistake: the scale that other attentions have
        layer.attention.scaling = 8**-0.5
    assert distance(expert(expert.view(canvas)), expected) > 1e-2


def test_view_of_one_colour_is_zero():
    expert = build_expert(resolve_expert("pix2struct-tiny"))
    canvas = torch.full((1, 3, 64, 64), 130, dtype=torch.uint8)
    assert not expert.view(canvas).any()


def test_float_canvas_gives_the_same_view():
    expert = build_expert(resolve_expert("pix2struct-tiny"))
    canvas = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
    torch.testing.assert_close(expert.view(canvas / 255), expert.view(canvas))


def test_overlap_shows_a_patch_its_neighbourhood():
    plain = build_expert(resolve_expert("pix2struct-tiny"))
    entry = {"preset": "pix2struct-tiny", "arch": {"overlap": 4}}
    wide = build_expert(resolve_expert(entry))
    view = torch.randn(1, 3, 64, 64)
    windows = wide.patches(view).unflatten(2, (16, 16, 3))
    assert plain.patches(view).shape == (1, 64, 192)
    assert torch.equal(windows[0, 9, 4:12, 4:12].flatten(), plain.patches(view)[0, 9])
    assert torch.equal(windows[0, 9], view[0, :, 4:20, 4:20].permute(1, 2, 0))
    assert not windows[0, 0, :4].any()  # outside the view: zero, the mean


def test_queries_carry_the_scale_of_attention():
    """Scores of a fresh expert are of order one, so that a small one can learn from scratch."""
    expert = build_expert(resolve_expert("pix2struct-tiny"))
    attention = expert.layers[0].attention
    tokens = torch.randn(64, 96)
    q, k = (p(tokens).view(64, 3, 32) for p in (attention.query, attention.key))
    scores = torch.einsum("qhd,khd->hqk", q, k)
    assert 0.3 < scores.std() < 3


def test_too_many_rows_for_the_tables():
    entry = {"preset": "pix2struct-tiny", "view": {"size": 128}}
    with pytest.raises(ValueError, match=r"16 rows of patches.*arch.table_size to 17"):
        build_expert(resolve_expert(entry))
