"""Every expert against numbers that the official Eagle code produced with random weights.

A wrong detail moves an output by 3 to 60 %; the tolerance is 1e-5.
"""

import pytest
import torch
import torch.nn.functional as F
from eagle_release import (
    build,
    clip_arch,
    config,
    eva_arch,
    load,
    needs_goldens,
    pix_arch,
    read,
    sam_arch,
)

from eagle_moe.experts import VisionExpert, clip, eva02, sam
from eagle_moe.fusion import FUSIONS

pytestmark = needs_goldens


def distance(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Relative L2; the golden may be tokens (B,N,C) where ours is a map (B,C,h,w)."""
    if golden.ndim == 3 and ours.ndim == 4:
        ours = ours.flatten(2).transpose(1, 2)
    assert ours.shape == golden.shape
    return ((ours - golden).norm() / golden.norm()).item()


def look(expert: VisionExpert, canvas: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return expert(expert.view(canvas))


def outputs(expert: VisionExpert, canvas: torch.Tensor) -> list[torch.Tensor]:
    """What every block gives out, in order."""
    seen: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda m, i, out: seen.append(out)) for b in expert.blocks]
    look(expert, canvas)
    for hook in hooks:
        hook.remove()
    return seen


# CLIP


def golden_clip(size: int, keep_cls: bool = False) -> tuple[VisionExpert, dict]:
    tensors = read("clip")
    expert = build("clip", size, clip_arch(config("clip"), keep_cls))
    return load(expert, tensors, "weight.vision_tower."), tensors


@pytest.mark.parametrize("size", [56, 84, 42])
def test_clip(size):
    expert, golden = golden_clip(size)
    canvas = golden[f"px{size}.input_u8"]
    assert distance(look(expert, canvas), golden[f"px{size}.output"]) < 1e-5
    for i, out in enumerate(outputs(expert, canvas)):
        assert distance(out, golden[f"px{size}.layer{i}"]) < 1e-5


def test_clip_embeddings_with_cls():
    expert, golden = golden_clip(84, keep_cls=True)
    with torch.no_grad():
        tokens = expert.embed(expert.view(golden["px84.input_u8"]))
    assert distance(tokens, golden["px84.embeddings_with_cls"]) < 1e-5


def test_clip_mistakes(monkeypatch):
    kept, golden = golden_clip(84, keep_cls=True)
    canvas, output = golden["px84.input_u8"], golden["px84.output"]
    assert distance(look(kept, canvas), output) > 0.05
    resize = clip.resize_table
    monkeypatch.setattr(clip, "resize_table", lambda t, n, antialias: resize(t, n, False))
    small = golden["px42.input_u8"]
    assert distance(look(golden_clip(42)[0], small), golden["px42.output"]) > 0.05


# ConvNeXt


@pytest.mark.parametrize("size", [128, 100])
def test_convnext(size):
    c, golden = config("convnext"), read("convnext")
    expert = build("convnext", size, {"depths": c["depths"], "dims": c["dims"]})
    load(expert, golden, "weight.vision_tower.")
    canvas = golden[f"px{size}.input_u8"]
    assert distance(look(expert, canvas), golden[f"px{size}.output"]) < 1e-5
    last = [sum(c["depths"][: i + 1]) - 1 for i in range(4)]
    stages = outputs(expert, canvas)
    for i, block in enumerate(last):
        assert distance(stages[block], golden[f"px{size}.stage{i}"]) < 1e-5


def test_convnext_mistake():
    c, golden = config("convnext"), read("convnext")
    expert = build("convnext", 128, {"depths": c["depths"], "dims": c["dims"]})
    load(expert, golden, "weight.vision_tower.")
    for block in expert.blocks:
        block.norm.eps = 1e-1
    assert distance(look(expert, golden["px128.input_u8"]), golden["px128.output"]) > 1e-3


# EVA-02


def golden_eva() -> tuple[VisionExpert, dict]:
    c, golden = config("eva"), read("eva")
    arch = eva_arch({**c}, c["global_blocks"])
    return load(build("eva02", c["img"], arch), golden, "weight.vision_tower."), golden


def test_eva02():
    expert, golden = golden_eva()
    canvas = golden["px160.input_u8"]
    assert distance(look(expert, canvas), golden["px160.output"]) < 1e-5
    for i, out in enumerate(outputs(expert, canvas)):
        assert distance(out, golden[f"px160.block{i}"]) < 1e-5


def test_eva02_attention_and_tables():
    expert, golden = golden_eva()
    attention = []
    for index in (0, 2):
        attn = expert.layers[index].attn
        attn.register_forward_hook(lambda m, i, out: attention.append(out))
    look(expert, golden["px160.input_u8"])
    assert distance(attention[0][:9], golden["px160.attn0_windows"]) < 1e-5
    assert distance(attention[1], golden["px160.attn2_global"]) < 1e-5
    for name, cells in (("win", 4), ("glb", 10)):
        cos, sin = expert.rotary(cells, torch.device("cpu"))
        torch.testing.assert_close(cos, golden[f"rope_{name}.cos"])
        torch.testing.assert_close(sin, golden[f"rope_{name}.sin"])


def masked_attention(q, k, v):
    """Padded keys are exactly zero here (keys have no bias): leave them out."""
    real = (k.abs().sum(-1) > 0)[:, :, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=real)


@pytest.mark.parametrize("mistake", ["rotary", "antialias", "mask"])
def test_eva02_mistakes(monkeypatch, mistake):
    expert, golden = golden_eva()
    if mistake == "rotary":
        tables = eva02.rotary_tables
        monkeypatch.setattr(
            eva02, "rotary_tables", lambda n, d, extent, b, dev: tables(n, d, n, b, dev)
        )
    elif mistake == "antialias":
        resize = eva02.resize_table
        monkeypatch.setattr(eva02, "resize_table", lambda t, n, antialias: resize(t, n, True))
    else:
        shim = type("F", (), {"silu": F.silu, "scaled_dot_product_attention": masked_attention})
        monkeypatch.setattr(eva02, "F", shim)
    assert distance(look(expert, golden["px160.input_u8"]), golden["px160.output"]) > 0.05


# SAM


def golden_sam(size: int = 160) -> tuple[VisionExpert, dict]:
    golden = read("sam")
    return load(build("sam", size, sam_arch(config("sam"))), golden, "weight.vision_tower."), golden


def test_sam():
    expert, golden = golden_sam()
    canvas = golden["px160.input_u8"]
    assert distance(look(expert, canvas), golden["px160.output"]) < 1e-5
    for i, out in enumerate(outputs(expert, canvas)):
        assert distance(out, golden[f"px160.layer{i}"]) < 1e-5


def test_sam_resamples_relative_tables(monkeypatch):
    expert, golden = golden_sam(224)
    table = golden["px224.pos_embed_override"].flatten(0, 2)
    monkeypatch.setattr(sam, "resize_table", lambda t, n, antialias: table)
    assert distance(look(expert, golden["px224.input_u8"]), golden["px224.output"]) < 1e-5


def test_sam_mistakes(monkeypatch):
    expert, golden = golden_sam()
    canvas, output = golden["px160.input_u8"], golden["px160.output"]
    bias = sam.SAMAttention.bias
    monkeypatch.setattr(
        sam.SAMAttention, "bias", lambda self, q, h, w: bias(self, q * q.shape[-1] ** -0.5, h, w)
    )
    assert distance(look(expert, canvas), output) > 0.05
    monkeypatch.setattr(sam.SAMAttention, "bias", lambda self, q, h, w: bias(self, q, w, h).mT)
    assert distance(look(expert, canvas), output) > 0.05


# Pix2Struct


def golden_pix() -> tuple[VisionExpert, dict]:
    golden = read("pix2struct")
    expert = build("pix2struct", 720, pix_arch(config("pix2struct")))
    return load(expert, golden, "weight.vision_tower."), golden


@pytest.mark.parametrize("size", [64, 80])
def test_pix2struct(size):
    expert, golden = golden_pix()
    canvas = golden[f"px{size}.input_u8"]
    assert distance(look(expert, canvas), golden[f"px{size}.last_hidden_2025"]) < 1e-5
    patches = expert.patches(expert.view(canvas))
    rows = golden[f"px{size}.patch_rows_index"]
    real = rows < 2025
    assert distance(patches[:, rows[real]], golden[f"px{size}.patch_rows"][:, real, 2:]) < 1e-5
    sums = golden[f"px{size}.patch_sum_per_row"][:, :2025]
    torch.testing.assert_close(patches.sum(-1), sums, atol=1e-2, rtol=1e-4)


def test_pix2struct_mistakes():
    expert, golden = golden_pix()
    canvas, output = golden["px64.input_u8"], golden["px64.last_hidden_2025"]
    for layer in expert.layers:
        layer.attention.scaling = 8**-0.5
    assert distance(look(expert, canvas), output) > 0.01
    expert, _ = golden_pix()
    late = expert.view(expert.view(canvas))  # statistics once more, after the resize
    with torch.no_grad():
        assert distance(expert(late), output) > 1e-3


# The mixture


def golden_experts(c: dict, tensors: dict) -> dict[str, VisionExpert]:
    size = c["input"]
    global_layers = [2]  # every third, as in the release
    parts = {
        "clip": ("clip", c["clip_input"], clip_arch(c["clip"])),
        "convnext": (
            "convnext",
            size,
            {"depths": c["convnext"]["depths"], "dims": c["convnext"]["dims"]},
        ),
        "sam": ("sam", size, sam_arch(c["sam"])),
        "det": ("eva02", size, eva_arch(c["eva"], global_layers)),
        "pix2struct": ("pix2struct", 720, pix_arch(c["pix"])),
    }
    return {
        name: load(build(kind, view, arch), tensors, f"weight.vision_towers.{i}.vision_tower.")
        for i, (name, (kind, view, arch)) in enumerate(parts.items())
    }


def release_canvas(base: torch.Tensor) -> torch.Tensor:
    """The 1024 px image of `mixture_real`, by the formula in its README."""
    x = base.repeat_interleave(4, 2).repeat_interleave(4, 3).int()
    y = torch.arange(1024)
    c = torch.arange(3)
    wave = (7 * y[None, :, None] + 13 * y[None, None, :] + 5 * c[:, None, None]) % 23 - 11
    return (x + wave[None]).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", ["mixture_small", "mixture_real"])
def test_mixture(name):
    golden, c = read(name), config(name, "cfg")
    canvas = golden["input_u8"] if name == "mixture_small" else None
    canvas = release_canvas(golden["input_base_u8"]) if canvas is None else canvas
    experts = golden_experts(c, golden)
    clip_view = experts["clip"].view(canvas)
    rows = clip_view[:, :, [0, 1, clip_view.shape[2] // 2, -1]]
    assert distance(rows, golden["clip_input_checksum_rows"]) < 1e-5
    maps = {key: look(expert, canvas) for key, expert in experts.items()}
    for key in ("clip", "convnext", "sam", "det"):
        assert distance(maps[key], golden[f"raw.{key}"]) < 1e-5, key
    kind = FUSIONS["channel_concat"]
    channels = {key: expert.channels for key, expert in experts.items()}
    assert list(channels.values()) == config(name, "channels_x5")
    fused = kind(channels, kind.Options(grid=32))(maps)
    assert distance(fused, golden["x5.features"]) < 1e-5
    wrong = kind(channels, kind.Options(grid=32, align_corners=False))(maps)
    assert distance(wrong, golden["x5.features"]) > 0.01
