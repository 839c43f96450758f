"""bf16 weights and views against the fp32 numbers of the release.

By the README of golden set A the official code itself moves by 0.6 % (ConvNeXt) to 1.6 % (EVA-02)
relative L2 on the small mixture, per expert in the fused tokens. Ours moves no further. On other
images, weights and sizes there is no such figure; the official arithmetic is rebuilt instead.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_moe.experts import VisionExpert, eva02, sam
from tests.eagle_release import (
    SINGLE,
    X5,
    config,
    groups,
    mixture,
    mixture_canvas,
    output_error,
    outputs,
    read,
    tower,
)
from tests.parity import distance, look

TOWERS = [(file, group) for file in SINGLE for group in groups(outputs(file, inputs=""))]

# Per cent, to the digits that are published; per expert only ConvNeXt's and EVA's (the most) are.
OFFICIAL = {"convnext": 0.6}
MOST = 1.6
# Where nothing is published. Over 24 other images on set A an expert's error was up to 1.5 times
# that of the published one.
ELSEWHERE = 2.0


def in_bf16(module: Any) -> Any:
    return deepcopy(module).to(torch.bfloat16)


@cache
@torch.no_grad()
def errors(file: str) -> dict[str, float]:
    """Per cent of each official tower's columns in the fused tokens of X5."""
    fused = in_bf16(mixture(file).model.vision_tower)(mixture_canvas(file))
    assert fused.dtype is torch.bfloat16
    widths = config(file, "channels_x5")
    columns = (x.split(widths, dim=-1) for x in (fused.float(), read(file)["x5.features"]))
    return {
        name: 100 * distance(*pair)
        for name, pair in zip(X5, zip(*columns, strict=True), strict=True)
    }


@pytest.mark.parametrize("file", ["mixture_small", "mixture_real"])
@pytest.mark.parametrize("name", X5)
def test_an_expert_in_a_mixture(file, name):
    published = file == "mixture_small" and config("seed_name") == "A"
    bound = OFFICIAL.get(name, MOST) if published else ELSEWHERE * MOST
    assert round(errors(file)[name], 1) <= bound


@pytest.mark.parametrize(("file", "group"), TOWERS)
def test_an_expert_alone(file, group):
    expert = in_bf16(tower(file, group))
    assert 100 * output_error(expert, file, group) <= ELSEWHERE * MOST


# The official arithmetic where it differs from ours: attention step by step (in EVA-02 with the
# softmax in bf16), EVA-02's rotary tables and their use in bf16.


def official_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def official_eva_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def official_sam_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    scores = q * q.shape[-1] ** -0.5 @ k.mT + attn_mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def with_attention(attention: Any) -> ModuleType:
    """torch.nn.functional with another attention."""
    module = ModuleType("functional")
    vars(module).update(vars(F), scaled_dot_product_attention=attention)
    return module


def mean_error(expert: VisionExpert, canvases: list[Tensor]) -> float:
    low = in_bf16(expert)
    return mean(distance(look(low, c).float(), look(expert, c)) for c in canvases)


def eva_and_sam() -> dict[str, tuple[VisionExpert, Tensor]]:
    """Alone and in the small mixture, each with the image that its golden was made from."""
    found = {}
    for file in ("eva", "sam"):
        group = groups(read(file))[0]
        found[file] = (tower(file, group), read(file)[f"{group}.input_u8"])
        mixed = mixture("mixture_small").model.vision_tower.towers[SINGLE[file]]
        found[f"{file} in a mixture"] = (mixed, mixture_canvas("mixture_small"))
    return found


def test_eva_and_sam_are_no_further_off_than_the_official_arithmetic(monkeypatch):
    """On average over shifted images; a tenth is left to chance."""
    cases = {
        name: (expert, [canvas.roll((5 * i, 3 * i), (2, 3)) for i in range(16)])
        for name, (expert, canvas) in eva_and_sam().items()
    }
    ours = {name: mean_error(*case) for name, case in cases.items()}
    monkeypatch.setattr(eva02, "rotate", official_rotate)
    monkeypatch.setattr(eva02, "F", with_attention(official_eva_attention))
    monkeypatch.setattr(sam, "F", with_attention(official_sam_attention))
    bounds = {name: 1.1 * mean_error(*case) for name, case in cases.items()}
    assert {name: error for name, error in ours.items() if error > bounds[name]} == {}
