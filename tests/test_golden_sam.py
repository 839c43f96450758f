"""SAM with the short neck as the official release runs it, tensor for tensor."""

from __future__ import annotations

import pytest
from torch import Tensor

from eagle_moe.experts import sam
from tests.eagle_release import (
    WRONG,
    as_output,
    assert_same,
    bhwc,
    groups,
    on_grids,
    output_error,
    outputs,
    read,
    tower,
)
from tests.parity import look, recorded

NAMES = outputs("sam", inputs=r"px\d+\.(input_u8|pos_embed_override)")
GROUPS = groups(NAMES)


def trace(group: str) -> dict[str, Tensor]:
    golden, model = read("sam"), tower("sam", group)
    parts = {f"layer{i}": layer for i, layer in enumerate(model.layers)}
    with recorded({"patch_embed": model.patch_embed, "neck": model.neck, **parts}) as seen:
        x = look(model, golden[f"{group}.input_u8"])
    seen |= {name: bhwc(seen[name]) for name in ("patch_embed", "neck")}
    seen["output"] = as_output(x, golden[f"{group}.output"])
    return {f"{group}.{key}": value for key, value in seen.items()} | on_grids(x, golden, group)


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    return {name: value for group in GROUPS for name, value in trace(group).items()}


def test_no_golden_tensor_is_left_out(ours):
    assert set(NAMES) <= set(ours)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_release(ours, name):
    assert_same(ours[name], read("sam")[name])


# Deliberate mistakes


@pytest.mark.parametrize("group", GROUPS)
def test_relative_positions_from_the_scaled_query_would_show(monkeypatch, group):
    bias = sam.SAMAttention.bias
    monkeypatch.setattr(
        sam.SAMAttention, "bias", lambda self, q, h, w: bias(self, q * q.shape[-1] ** -0.5, h, w)
    )
    assert output_error(tower("sam", group), "sam", group) > WRONG


@pytest.mark.parametrize("group", GROUPS)
def test_swapped_tables_of_rows_and_columns_would_show(group):
    model = tower("sam", group)
    for layer in model.layers:
        attn = layer.attn
        attn.rel_pos_h, attn.rel_pos_w = attn.rel_pos_w, attn.rel_pos_h
    assert output_error(model, "sam", group) > WRONG
