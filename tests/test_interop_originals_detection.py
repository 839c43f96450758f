"""`.pth` files of segment-anything and of EVA-02's detector."""

import pytest
import torch

from eagle_moe.canvas import CLIP_MEAN, CLIP_STD
from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.interop.originals import find_original, load_original
from tests.eagle_release import config, needs_goldens, read
from tests.originals import distance, load, pixels, spec_of, swap
from tests.parity import randomise
from tests.upstream_models import sam_encoder, timm_eva

modeling = pytest.importorskip("segment_anything.modeling")

# segment-anything

SAM = {"image_size": 80, "patch_size": 8, "hidden_size": 48, "layers": 3, "heads": 4}
SAM |= {"mlp_size": 96, "window": 4, "global_layers": [1], "neck_channels": 16, "unshuffle": 1}


def sam_spec(**arch):
    return spec_of("sam", 80, **{**SAM, "neck": "original", **arch})


@pytest.fixture(scope="module")
def sam():
    """The whole model, as segment_anything.build_sam puts it together, but small."""
    prompts = modeling.PromptEncoder(16, (10, 10), (80, 80), mask_in_chans=4)
    transformer = modeling.TwoWayTransformer(depth=1, embedding_dim=16, num_heads=2, mlp_dim=8)
    decoder = modeling.MaskDecoder(transformer_dim=16, transformer=transformer)
    return randomise(modeling.Sam(sam_encoder(), prompts, decoder))


@torch.no_grad()
def test_segment_anything(sam, tmp_path):
    path = tmp_path / "sam_vit.pth"
    state = sam.state_dict()
    torch.save(state, path)
    expected = sam.image_encoder(pixels(80))
    assert distance(load(sam_spec(), path)(pixels(80)), expected) < 1e-5
    swap(state, *(f"image_encoder.blocks.0.norm{i}.weight" for i in (1, 2)))
    torch.save(state, path)
    assert distance(load(sam_spec(), path)(pixels(80)), expected) > 1e-2


@torch.no_grad()
def test_other_necks_of_segment_anything(sam, tmp_path):
    path = tmp_path / "sam_vit.pth"
    torch.save(sam.state_dict(), path)
    layers = []
    hook = sam.image_encoder.blocks[-1].register_forward_hook(lambda m, i, out: layers.append(out))
    sam.image_encoder(pixels(80))
    hook.remove()
    last = layers[0].permute(0, 3, 1, 2)
    half = sam.image_encoder.neck[1](sam.image_encoder.neck[0](last))
    assert distance(load(sam_spec(neck="short"), path)(pixels(80)), half) < 1e-5
    assert distance(load(sam_spec(neck="none"), path)(pixels(80)), last) < 1e-5


@pytest.mark.parametrize(
    ("arch", "fault"),
    [
        ({"layers": 4}, "nothing in the file for: layers.3.norm1.weight"),
        ({"layers": 2}, "keys without a place in the model: image_encoder.blocks.2"),
        ({"hidden_size": 64}, r"wrong shapes: image_encoder.pos_embed \[100, 48\], expected"),
        ({"window": 5}, r"blocks.0.attn.rel_pos_h \[7, 12\], expected \[9, 12\]"),
        ({"heads": 3}, r"blocks.0.attn.rel_pos_h \[7, 12\], expected \[7, 16\]"),
        ({"global_layers": [2]}, r"blocks.1.attn.rel_pos_h \[19, 12\], expected \[7, 12\]"),
    ],
)
def test_a_segment_anything_of_another_size(sam, tmp_path, arch, fault):
    path = tmp_path / "sam_vit.pth"
    torch.save(sam.state_dict(), path)
    with pytest.raises(ValueError, match=fault) as error:
        load_original(sam_spec(**arch), path)
    assert str(error.value).startswith(f"{path} (a checkpoint of segment-anything):")


# EVA-02


def detector(net, wrap=None):
    """A backbone's tensors as the detection code of EVA-02 saves them, inside a whole detector."""
    state = {f"backbone.net.{key}": value for key, value in net.items()}
    state["backbone.simfp_2.0.weight"] = torch.zeros(4, 4, 2, 2)
    state["roi_heads.box_head.0.fc1.weight"] = torch.zeros(4, 4)
    state["backbone.net.rope_win.freqs_cos"] = torch.zeros(16, 8)
    state["backbone.net.blocks.0.attn.rope.freqs_sin"] = torch.zeros(16, 8)
    if wrap is None:
        return state
    rest = {"ema_state": ["module", "model"], "module": ["model"], "model": []}[wrap]
    older = {key: torch.zeros_like(value) for key, value in state.items()}
    return {wrap: state, **dict.fromkeys(rest, older), "iteration": 7}


@pytest.fixture(scope="module")
def eva():
    return timm_eva()


def upstream(timms):
    """timm's tensors under the names of EVA-02/det, which keeps a position for the CLS token."""
    words = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3", "mlp.norm": "mlp.ffn_ln"}
    net = {}
    for key, value in timms.items():
        if key.startswith(("blocks", "patch_embed", "pos_embed")):
            for theirs, det in words.items():
                key = key.replace(theirs, det)
            net[key] = value
    net["pos_embed"] = torch.cat([torch.full((1, 1, 48), 9.0), net["pos_embed"]], dim=1)
    return net


def eva_spec():
    arch = {"hidden_size": 48, "layers": 3, "heads": 4, "mlp_size": 64, "patch_size": 8}
    return spec_of("eva02", 64, **arch, global_layers=[0, 1, 2], window=4, table_cells=8)


@torch.no_grad()
@pytest.mark.parametrize("wrap", ["ema_state", "module", "model", None])
def test_eva02_where_all_layers_are_global(eva, tmp_path, wrap):
    path = tmp_path / "eva02_det.pth"
    expected = eva.forward_intermediates(pixels(64), intermediates_only=True)[-1]
    net = upstream(eva.state_dict())
    torch.save(detector(net, wrap), path)
    assert distance(load(eva_spec(), path)(pixels(64)), expected) < 1e-5
    ignored = find_original(eva_spec(), path).plan().ignored
    assert "detector" in ignored["roi_heads.box_head.0.fc1.weight"]
    assert "computed" in ignored["backbone.net.rope_win.freqs_cos"]
    swap(net, "blocks.1.mlp.w1.weight", "blocks.1.mlp.w2.weight")
    torch.save(detector(net, wrap), path)
    assert distance(load(eva_spec(), path)(pixels(64)), expected) > 1e-2


@torch.no_grad()
@needs_goldens
def test_eva02_gives_the_golden_numbers(tmp_path):
    golden, sizes = read("eva"), config("eva")
    view = {"size": sizes["img"], "mean": CLIP_MEAN, "std": CLIP_STD}
    arch = {
        "patch_size": sizes["patch"],
        "hidden_size": sizes["embed"],
        "layers": sizes["depth"],
        "heads": sizes["heads"],
        "mlp_size": sizes["mlp_hidden"],
        "window": sizes["window"],
        "global_layers": sizes["global_blocks"],
        "table_cells": sizes["pretrain_grid"],
        "rotary_cells": sizes["rope_pt_seq_len"],
    }
    card = {"checkpoint": "", "licence": "unknown", "source": "test"}
    spec = resolve_expert({"kind": "eva02", "view": view, "arch": arch, "card": card})
    prefix = "weight.vision_tower."
    net = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    torch.save(detector(net, "ema_state"), tmp_path / "eva02_det.pth")
    expert = load(spec, tmp_path / "eva02_det.pth")
    pixels_name = f"px{sizes['img']}"
    seen = expert(expert.view(golden[f"{pixels_name}.input_u8"]))
    assert distance(seen, golden[f"{pixels_name}.output"]) < 1e-5
    swap(net, "blocks.0.attn.q_proj.weight", "blocks.0.attn.k_proj.weight")
    torch.save(detector(net, "ema_state"), tmp_path / "eva02_det.pth")
    expert = load(spec, tmp_path / "eva02_det.pth")
    seen = expert(expert.view(golden[f"{pixels_name}.input_u8"]))
    assert distance(seen, golden[f"{pixels_name}.output"]) > 1e-2


def test_the_cls_position_is_dropped_and_nothing_else(eva, tmp_path):
    torch.save(detector(upstream(eva.state_dict())), tmp_path / "eva02_det.pth")
    state = load_original(eva_spec(), tmp_path / "eva02_det.pth")
    assert torch.equal(state["pos_embed"], eva.state_dict()["pos_embed"][0])
    assert state.keys() == build_expert(eva_spec()).state_dict().keys()


def test_a_key_below_the_backbone_that_no_rule_knows(eva, tmp_path):
    net = {**upstream(eva.state_dict()), "norm.weight": torch.zeros(48)}
    torch.save(detector(net), tmp_path / "eva02_det.pth")
    with pytest.raises(ValueError, match=r"unknown keys: backbone.net.norm.weight \[48\]"):
        load_original(eva_spec(), tmp_path / "eva02_det.pth")
