"""CLIP as the official release runs it, tensor for tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_moe.experts import clip
from tests.eagle_release import (
    WRONG,
    as_output,
    assert_same,
    groups,
    on_grids,
    output_error,
    outputs,
    read,
    tower,
)
from tests.parity import distance, look, recorded

NAMES = outputs("clip", inputs=r"px\d+\.input_u8")
GROUPS = groups(NAMES)
SMALLEST = GROUPS[0]


def trace(group: str) -> dict[str, Tensor]:
    golden, model = read("clip"), tower("clip", group)
    canvas = golden[f"{group}.input_u8"]
    parts = {f"layer{i}": layer for i, layer in enumerate(model.layers)}
    with recorded({"after_pre_layernorm": model.pre_layernorm, **parts}) as seen:
        x = look(model, canvas)
    # Our release profile never makes the CLS token; with it, the embedding is the library's.
    with_cls = tower("clip", group, keep_cls=True)
    with torch.no_grad():
        seen["embeddings_with_cls"] = with_cls.embed(with_cls.view(canvas))
    seen["output"] = as_output(x, golden[f"{group}.output"])
    return {f"{group}.{key}": value for key, value in seen.items()} | on_grids(x, golden, group)


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    return {name: value for group in GROUPS for name, value in trace(group).items()}


def test_no_golden_tensor_is_left_out(ours):
    assert set(NAMES) <= set(ours)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_release(ours, name):
    assert_same(ours[name], read("clip")[name])


# Deliberate mistakes


@pytest.mark.parametrize("group", GROUPS)
def test_cls_in_attention_would_show(group):
    assert output_error(tower("clip", group, keep_cls=True), "clip", group) > WRONG


@pytest.mark.parametrize("group", GROUPS)
def test_the_final_norm_would_show(ours, group):
    golden = read("clip")
    weight, bias = (
        golden[f"weight.vision_tower.vision_model.post_layernorm.{part}"]
        for part in ("weight", "bias")
    )
    normed = F.layer_norm(ours[f"{group}.output"], weight.shape, weight, bias)
    assert distance(normed, golden[f"{group}.output"]) > WRONG


def test_a_position_table_without_antialias_would_show(monkeypatch):
    expert = tower("clip", SMALLEST)
    if expert.view_spec.size >= expert.arch.image_size:
        pytest.skip("no view of this golden set makes the position table smaller")
    resize = clip.resize_table
    monkeypatch.setattr(clip, "resize_table", lambda t, n, antialias: resize(t, n, False))
    assert output_error(expert, "clip", SMALLEST) > WRONG
