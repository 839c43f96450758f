"""Pix2Struct as the official release runs it, tensor for tensor.

The release pads its patches to a fixed number and masks the padding. Every patch of a square image
is real, so ours has neither; the golden's padding is held against what it must be: zeros that are
counted from 0 (real rows and columns count from 1), embedded like any patch, and masked out.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_moe.canvas import resize
from eagle_moe.experts import VisionExpert
from tests.eagle_release import (
    WRONG,
    as_output,
    assert_same,
    bnc,
    config,
    groups,
    output_error,
    outputs,
    read,
    tower,
)
from tests.parity import look, recorded

NAMES = outputs("pix2struct", inputs=r"px\d+\.(input_u8|patch_rows_index)")
GROUPS = groups(NAMES)


def patch_matrix(model: VisionExpert, canvas: Tensor, rows: int) -> Tensor:
    """Row id, column id and values of our patches (B,rows,2+values), padded as the release does."""
    values = model.patches(model.view(canvas))
    ids = torch.cartesian_prod(*[torch.arange(1.0, model.cells + 1)] * 2)
    matrix = torch.cat([ids.expand(values.shape[0], -1, -1), values], dim=2)
    return F.pad(matrix, (0, 0, 0, rows - matrix.shape[1]))


def padding_embedding(model: VisionExpert) -> Tensor:
    """A patch of zeros at row 0 and column 0."""
    return (
        model.patch_projection.bias + model.row_embedder.weight[0] + model.column_embedder.weight[0]
    )


@torch.no_grad()
def trace(group: str) -> dict[str, Tensor]:
    golden, model = read("pix2struct"), tower("pix2struct", group)
    canvas, index = golden[f"{group}.input_u8"], golden[f"{group}.patch_rows_index"]
    rows, real = config("pix2struct", "max_patches"), model.cells**2
    with recorded({"layer0": model.layers[0]}) as seen:
        x = look(model, canvas)
    matrix = patch_matrix(model, canvas, rows)
    padding = padding_embedding(model).expand(len(canvas), rows - real, -1)
    found = {
        "patch_rows": matrix[:, index],
        "patch_sum_per_row": matrix[:, :, 2:].sum(-1),
        "attention_mask": (torch.arange(rows) < real).float().expand(len(canvas), -1),
        "embeddings_rows": torch.cat([seen["layer0.input"], padding], dim=1)[:, index],
        f"last_hidden_{real}": bnc(x),
        "output": as_output(x, golden[f"{group}.output"]),
    }
    return {f"{group}.{key}": value for key, value in found.items()}


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    return {name: value for group in GROUPS for name, value in trace(group).items()}


def test_no_golden_tensor_is_left_out(ours):
    assert set(NAMES) <= set(ours)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_release(ours, name):
    # The tolerance is that of one value.
    summed = name.endswith("sum_per_row")
    values = 3 * config("pix2struct", "patch") ** 2 if summed else 1
    assert_same(ours[name] / values, read("pix2struct")[name] / values)


# Deliberate mistakes


@pytest.mark.parametrize("group", GROUPS)
def test_scaled_attention_would_show(group):
    model = tower("pix2struct", group)
    for layer in model.layers:
        layer.attention.scaling = model.arch.head_dim**-0.5
    assert output_error(model, "pix2struct", group) > WRONG


def test_statistics_after_the_resize_would_show(monkeypatch):
    """On at least one of the images: the smoother it is, the less."""
    model = tower("pix2struct", GROUPS[0])
    view, spec = model.view, model.view_spec
    monkeypatch.setattr(model, "view", lambda c: view(resize(c / 255, spec.size, spec)))
    assert max(output_error(model, "pix2struct", group) for group in GROUPS) > WRONG
