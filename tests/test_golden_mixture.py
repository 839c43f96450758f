"""The release's mixtures, small and in release geometry, through our own vision tower, fusion and
connector: X5, and X4 as a model of four experts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from eagle_moe.experts import build_expert
from eagle_moe.fusion import FUSIONS
from eagle_moe.model import EagleMixForConditionalGeneration
from tests.eagle_release import (
    KINDS,
    RELATIVE,
    WRONG,
    X4,
    X5,
    as_output,
    assert_same,
    bnc,
    config,
    mixture,
    mixture_canvas,
    outputs,
    read,
)
from tests.parity import distance, recorded

FILES = ("mixture_small", "mixture_real")
NAMES = [(file, name) for file in FILES for name in outputs(file, inputs="input(_base)?_u8")]


@cache
def model(file: str) -> EagleMixForConditionalGeneration:
    """Shared by the tests, which must not change it."""
    return mixture(file)


@cache
@torch.no_grad()
def trace(file: str) -> dict[str, Tensor]:
    """What the model's parts give out: maps by official tower name, tokens, image tokens."""
    towers = model(file).model.vision_tower.towers
    with recorded({name: towers[kind] for name, kind in KINDS.items()}) as seen:
        image = model(file).get_image_features(mixture_canvas(file))
    return seen | {"fused": image.last_hidden_state, "image": torch.stack(image.pooler_output)}


@cache
@torch.no_grad()
def ours(file: str) -> dict[str, Tensor]:
    golden, seen = read(file), trace(file)
    # Pix2Struct's tower resizes its map itself in the release; here that is the fusion's.
    raw = {f"raw.{name}": as_output(seen[name], golden[f"raw.{name}"]) for name in X5}
    view = seen["clip.input"]
    return {
        **raw,
        "clip_input_checksum_rows": view[:, :, [0, 1, view.shape[2] // 2, -1]],
        "x5.features": seen["fused"],
        "x4.features": mixture(file, X4).model.vision_tower(mixture_canvas(file)),
        "projector.output": seen["image"],
    }


@pytest.mark.parametrize("file", FILES)
def test_no_golden_tensor_is_left_out(file):
    assert {name for of, name in NAMES if of == file} <= set(ours(file))


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_equals_the_release(file, name):
    assert_same(ours(file)[name], read(file)[name])


@pytest.mark.parametrize("file", FILES)
def test_order_and_channels_are_those_of_the_release(file):
    towers = model(file).model.vision_tower.towers
    assert list(towers) == [KINDS[name] for name in config(file, "order_x5")]
    assert [expert.channels for expert in towers.values()] == config(file, "channels_x5")


@pytest.mark.parametrize("file", FILES)
def test_x4_is_x5_without_the_columns_of_sam_bit_for_bit(file):
    x5, widths = ours(file)["x5.features"], config(file, "channels_x5")
    columns = dict(zip(X5, x5.split(widths, dim=-1), strict=True))
    assert torch.equal(ours(file)["x4.features"], torch.cat([columns[n] for n in X4], dim=-1))


# Deliberate mistakes, on the small mixture

SMALL = FILES[0]


def refused(fused: Tensor) -> float:
    return distance(fused, read(SMALL)["x5.features"])


def maps() -> dict[str, Tensor]:
    seen = trace(SMALL)
    return {kind: seen[name] for name, kind in KINDS.items()}


def test_a_grid_without_align_corners_would_show():
    fusion = model(SMALL).model.vision_tower.fusion
    options = fusion.options.model_copy(update={"align_corners": False})
    channels = {kind: x.shape[1] for kind, x in maps().items()}
    assert refused(FUSIONS["channel_concat"](channels, options)(maps())) > WRONG


def test_two_experts_in_the_wrong_order_would_show():
    fusion = model(SMALL).model.vision_tower.fusion
    *rest, first, second = maps()
    swapped = {kind: maps()[kind] for kind in (*rest, second, first)}
    assert refused(fusion(swapped)) > WRONG


@torch.no_grad()
def test_a_view_of_clip_with_antialias_would_show():
    expert = model(SMALL).model.vision_tower.towers["clip"]
    view = expert.view_spec.model_copy(update={"antialias": True})
    smooth = build_expert(expert.spec.model_copy(update={"view": view}))
    smooth.load_state_dict(expert.state_dict())
    canvas = mixture_canvas(SMALL)
    assert distance(bnc(smooth(smooth.view(canvas))), read(SMALL)["raw.clip"]) > WRONG


@torch.no_grad()
def test_a_projector_with_gelu_by_tanh_would_show():
    first, _, second = model(SMALL).model.multi_modal_projector.layers
    tanh = nn.GELU(approximate="tanh")
    image = second(tanh(first(trace(SMALL)["fused"])))
    # The two are close: 2e-4 on set A, less where activations are larger.
    assert distance(image, read(SMALL)["projector.output"]) > 3 * RELATIVE
