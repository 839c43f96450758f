"""EVA-02 as the official release runs it, tensor for tensor."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_moe.experts import eva02
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

NAMES = outputs("eva", inputs=r"px\d+\.input_u8")
GROUPS = groups(NAMES)


def trace(group: str) -> dict[str, Tensor]:
    golden, model = read("eva"), tower("eva", group)
    parts = {f"block{i}": layer for i, layer in enumerate(model.layers)}
    for i, layer in enumerate(model.layers):
        parts[f"attn{i}_{'windows' if layer.window else 'global'}"] = layer.attn
    with recorded({"patch_embed": model.patch_embed, **parts}) as seen:
        x = look(model, golden[f"{group}.input_u8"])
    seen["patch_embed"] = bhwc(seen["patch_embed"])
    seen["pos_embed_resized"] = (seen["block0.input"] - seen["patch_embed"])[:1]
    seen["output"] = as_output(x, golden[f"{group}.output"])
    found = {f"{group}.{key}": value for key, value in seen.items()} | on_grids(x, golden, group)
    for name in golden:
        if re.fullmatch(rf"{group}\.attn\d+_windows", name):  # the first image's alone
            found[name] = found[name][: golden[name].shape[0]]
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    found = {name: value for group in GROUPS for name, value in trace(group).items()}
    model = tower("eva", GROUPS[0])
    for name, cells in (("win", model.arch.window), ("glb", model.cells)):
        cos, sin = model.rotary(cells, torch.device("cpu"))
        found |= {f"rope_{name}.cos": cos, f"rope_{name}.sin": sin}
    return found


def test_no_golden_tensor_is_left_out(ours):
    assert set(NAMES) <= set(ours)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_release(ours, name):
    assert_same(ours[name], read("eva")[name])


# Deliberate mistakes


@pytest.mark.parametrize("group", GROUPS)
def test_rotary_positions_that_global_layers_do_not_rescale_would_show(monkeypatch, group):
    tables, model = eva02.rotary_tables, tower("eva", group)
    if model.cells == model.arch.rotary_cells:
        pytest.skip("positions of the whole map need no rescaling in this golden set")

    def plain(cells: int, dim: int, extent: int, *rest: Any) -> eva02.Rotary:
        return tables(cells, dim, cells if cells == model.cells else extent, *rest)

    monkeypatch.setattr(eva02, "rotary_tables", plain)
    assert output_error(model, "eva", group) > WRONG


@pytest.mark.parametrize("group", GROUPS)
def test_a_position_table_with_antialias_would_show(monkeypatch, group):
    model = tower("eva", group)
    if model.cells >= model.arch.table_cells:
        pytest.skip("no smoothing when the position table is not made smaller")
    resize = eva02.resize_table
    monkeypatch.setattr(eva02, "resize_table", lambda t, n, antialias: resize(t, n, True))
    assert output_error(model, "eva", group) > WRONG


@pytest.mark.parametrize("group", GROUPS)
def test_masked_window_padding_would_show(monkeypatch, group):
    model = tower("eva", group)
    if model.cells % model.arch.window == 0:
        pytest.skip("no window of this golden set is padded")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        real = (k != 0).any(-1)[:, :, None, :]  # keys have no bias: those of the padding are zero
        return F.scaled_dot_product_attention(q, k, v, attn_mask=real)

    patched = {"silu": F.silu, "scaled_dot_product_attention": attention}
    monkeypatch.setattr(eva02, "F", type("F", (), patched))
    assert output_error(model, "eva", group) > WRONG
