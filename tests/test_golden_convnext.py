"""ConvNeXt as the official release runs it, tensor for tensor."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.eagle_release import (
    WRONG,
    as_output,
    assert_same,
    groups,
    on_grids,
    outputs,
    read,
    tower,
)
from tests.parity import distance, look, recorded

NAMES = outputs("convnext", inputs=r"px\d+\.input_u8")
GROUPS = groups(NAMES)


def trace(group: str) -> dict[str, Tensor]:
    golden, model = read("convnext"), tower("convnext", group)
    parts = {f"stage{i}": stage.blocks[-1] for i, stage in enumerate(model.stages)}
    with recorded({"stem": model.stem, **parts}) as seen:
        x = look(model, golden[f"{group}.input_u8"])
    seen["output"] = as_output(x, golden[f"{group}.output"])
    return {f"{group}.{key}": value for key, value in seen.items()} | on_grids(x, golden, group)


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    return {name: value for group in GROUPS for name, value in trace(group).items()}


def test_no_golden_tensor_is_left_out(ours):
    assert set(NAMES) <= set(ours)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_release(ours, name):
    assert_same(ours[name], read("convnext")[name])


@pytest.mark.parametrize("group", GROUPS)
def test_the_norm_of_the_head_would_show(ours, group):
    golden = read("convnext")
    weight, bias = (golden[f"weight.vision_tower.head.norm.{part}"] for part in ("weight", "bias"))
    normed = F.layer_norm(ours[f"{group}.output"], weight.shape, weight, bias)
    assert distance(normed, golden[f"{group}.output"]) > WRONG
