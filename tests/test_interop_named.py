"""Checkpoints of timm and open_clip, against those libraries' own forward."""

import json

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt

from eagle_moe.interop.originals import find_original, load_original
from tests.originals import as_map, distance, load, pixels, spec_of, swap
from tests.parity import randomise


def save(state, path):
    """As safetensors or as torch does it, by the ending."""
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


# Our own experts from files of timm and open_clip

CONVNEXT = {"depths": (1, 2, 2, 1), "dims": (8, 12, 16, 24)}


@pytest.fixture(scope="module")
def convnext():
    return randomise(ConvNeXt(**CONVNEXT, norm_eps=1e-5, num_classes=10))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("model.safetensors", None),
        ("pytorch_model.bin", None),
        ("convnext.pth", None),
        ("checkpoint.pth.tar", "state_dict_ema"),
    ],
)
def test_convnext_of_timm(convnext, tmp_path, name, inner):
    state = convnext.state_dict()
    wrapped = {inner: state, "state_dict": {}, "epoch": 3} if inner else state
    save(wrapped, tmp_path / name)
    folder = name in ("model.safetensors", "pytorch_model.bin")
    place = tmp_path if folder else tmp_path / name
    expected = convnext.forward_features(pixels(64))
    expert = load(spec_of("convnext", 64, **CONVNEXT), place)
    assert distance(expert(pixels(64)), expected) < 1e-5
    dilated = convnext_at(8, state)
    expert = load(spec_of("convnext", 64, **CONVNEXT, output_stride=8), place)
    assert distance(expert(pixels(64)), dilated) < 1e-5


def convnext_at(stride, state):
    model = ConvNeXt(**CONVNEXT, norm_eps=1e-5, num_classes=10, output_stride=stride).eval()
    model.load_state_dict(state)
    return model.forward_features(pixels(64))


@torch.no_grad()
def test_convnext_mistake(convnext, tmp_path):
    state = dict(convnext.state_dict())
    swap(state, "stages.1.blocks.0.gamma", "stages.1.blocks.1.gamma")
    save(state, tmp_path / "convnext.pth")
    expert = load(spec_of("convnext", 64, **CONVNEXT), tmp_path / "convnext.pth")
    assert distance(expert(pixels(64)), convnext.forward_features(pixels(64))) > 1e-2


@torch.no_grad()
def test_convnext_inside_open_clip(convnext, tmp_path):
    trunk = {k: v for k, v in convnext.state_dict().items() if not k.startswith("head.fc")}
    state = {f"visual.trunk.{key}": value for key, value in trunk.items()}
    state |= {"visual.head.proj.weight": torch.zeros(4, 24), "logit_scale": torch.tensor(1.0)}
    state |= {"text_projection": torch.zeros(4, 4), "positional_embedding": torch.zeros(7, 4)}
    save(state, tmp_path / "open_clip_model.safetensors")
    spec = spec_of("convnext", 64, **CONVNEXT)
    expected = convnext.forward_features(pixels(64))
    assert distance(load(spec, tmp_path)(pixels(64)), expected) < 1e-5
    assert "text tower" in find_original(spec, tmp_path).plan().ignored["logit_scale"]


VIT = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def vit():
    return randomise(CLIP(32, VIT, TEXT, quick_gelu=True))


def vit_map(model, size, layer=-1):
    seen = []
    block = model.visual.transformer.resblocks[layer]
    hook = block.register_forward_hook(lambda m, i, out: seen.append(out))
    model.visual(pixels(size))
    hook.remove()
    return as_map(seen[0])


def clip_spec(**arch):
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 128, "layers": 2, "heads": 2}
    return spec_of("clip", 32, **{**sizes, "mlp_size": 512, **arch})


@torch.no_grad()
def test_clip_of_open_clip(vit, tmp_path):
    """Queries, keys and values are one tensor there."""
    save(vit.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": VIT, "quick_gelu": True}})
    )
    expert = load(clip_spec(), tmp_path)
    assert distance(expert(pixels(32)), vit_map(vit, 32)) < 1e-5
    layer = expert.layers[0].self_attn
    layer.q_proj.weight, layer.k_proj.weight = layer.k_proj.weight, layer.v_proj.weight
    assert distance(expert(pixels(32)), vit_map(vit, 32)) > 1e-2
    with pytest.raises(ValueError, match='arch.activation is gelu.*activation: "quick_gelu"'):
        find_original(clip_spec(activation="gelu"), tmp_path)
    with pytest.raises(ValueError, match=r"arch.heads is 4, not 2.*`arch: {heads: 2}`"):
        find_original(clip_spec(heads=4), tmp_path)


# open_clip:<model>

MODEL = "ViT-B-32"
OPTIONS = {"layers": 3, "width": 64, "head_width": 16}


@pytest.fixture(scope="module")
def named_vit():
    vision = {**open_clip.get_model_config(MODEL)["vision_cfg"], **OPTIONS}
    return randomise(CLIP(512, vision, TEXT, quick_gelu=True))


def open_clip_spec(size, **arch):
    return spec_of(f"open_clip:{MODEL}", size, **{"quick_gelu": True, "options": OPTIONS, **arch})


@torch.no_grad()
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip(named_vit, tmp_path, name):
    state = named_vit.state_dict()
    save(state, tmp_path / name)
    save({"blocks.0.norm1.weight": torch.zeros(2)}, tmp_path / "model.safetensors")  # timm's form
    expected = vit_map(named_vit, 224)
    assert distance(load(open_clip_spec(224), tmp_path)(pixels(224)), expected) < 1e-5
    swap(state, *(f"visual.transformer.resblocks.{i}.mlp.c_fc.weight" for i in (0, 1)))
    save(state, tmp_path / name)
    assert distance(load(open_clip_spec(224), tmp_path)(pixels(224)), expected) > 1e-2


@torch.no_grad()
def test_open_clip_at_another_size_and_an_earlier_layer(named_vit, tmp_path):
    """The table is resampled as open_clip's own loader does it; later layers are left out."""
    state = {f"module.{key}": value for key, value in named_vit.state_dict().items()}
    path = tmp_path / "epoch_3.pt"
    save({"state_dict": state, "epoch": 3, "name": "mine"}, path)
    vision = {**open_clip.get_model_config(MODEL)["vision_cfg"], **OPTIONS, "image_size": 128}
    smaller = CLIP(512, vision, TEXT, quick_gelu=True).eval()
    plain = dict(named_vit.state_dict())
    open_clip.model.resize_pos_embed(plain, smaller)
    smaller.load_state_dict(plain)
    expert = load(open_clip_spec(128, layer=1), path)
    assert len(expert.body.transformer.resblocks) == 2
    assert distance(expert(pixels(128)), vit_map(smaller, 128, layer=1)) < 1e-5


@torch.no_grad()
def test_open_clip_with_a_tower_of_timm(tmp_path):
    options = {"timm_model_name": "vit_tiny_patch16_224"}
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    tower = open_clip.model._build_vision_tower(
        config["embed_dim"], {**config["vision_cfg"], **options, "timm_model_pretrained": False}
    )
    randomise(tower)
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    save({**state, "logit_bias": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    spec = spec_of("open_clip:ViT-B-16-SigLIP", 64, options=options)
    tower.trunk.set_input_size(img_size=64)
    expected = tower.trunk.forward_intermediates(
        pixels(64), indices=1, norm=False, intermediates_only=True
    )[0]
    assert distance(load(spec, tmp_path)(pixels(64)), expected) < 1e-5


def test_open_clip_that_does_not_fit(named_vit, tmp_path):
    path = tmp_path / "open_clip_model.safetensors"
    state = dict(named_vit.state_dict())
    del state["visual.ln_pre.weight"]
    state["visual.odd"] = torch.zeros(1)
    save(state, path)
    with pytest.raises(ValueError, match=r"do not fit open_clip:ViT-B-32.*ln_pre.weight.*odd"):
        load_original(open_clip_spec(224), path)
    wide = open_clip_spec(224, options={**OPTIONS, "width": 128})
    with pytest.raises(ValueError, match=r"size mismatch for|Missing key"):
        load_original(wide, path)


def test_an_activation_that_disagrees(named_vit, tmp_path):
    save(named_vit.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": {"vision_cfg": {}, "quick_gelu": False}}))
    with pytest.raises(ValueError, match="arch.quick_gelu is True, not False.*quick_gelu: false"):
        find_original(open_clip_spec(224), tmp_path)


# timm:<model>

TINY_VIT = "vit_tiny_patch16_224"


@torch.no_grad()
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "fine-tuned.pth"])
def test_timm_transformer(tmp_path, name):
    theirs = randomise(timm.create_model(TINY_VIT, depth=2, num_classes=7))
    state = theirs.state_dict()
    save(state, tmp_path / name)
    place = tmp_path / name if name.endswith("pth") else tmp_path
    spec = spec_of(f"timm:{TINY_VIT}", 224, norm=True, options={"depth": 2})
    expected = as_map(theirs.forward_features(pixels(224)))
    assert distance(load(spec, place)(pixels(224)), expected) < 1e-5
    swap(state, "blocks.0.norm1.weight", "blocks.1.norm2.weight")
    save(state, tmp_path / name)
    assert distance(load(spec, place)(pixels(224)), expected) > 1e-3


@torch.no_grad()
def test_timm_at_another_size(tmp_path):
    """The table is resampled as timm's own loader does it."""
    theirs = randomise(timm.create_model(TINY_VIT, depth=2))
    save(theirs.state_dict(), tmp_path / "model.safetensors")
    theirs.set_input_size(img_size=64)
    spec = spec_of(f"timm:{TINY_VIT}", 64, norm=True, options={"depth": 2})
    expected = as_map(theirs.forward_features(pixels(64)))
    assert distance(load(spec, tmp_path)(pixels(64)), expected) < 1e-5


@torch.no_grad()
def test_timm_convolutional_model_up_to_a_level(tmp_path):
    theirs = randomise(timm.create_model("resnet18"))
    save(theirs.state_dict(), tmp_path / "resnet18.pth")
    expert = load(spec_of("timm:resnet18", 64, layer=2), tmp_path / "resnet18.pth")
    expected = theirs.forward_intermediates(pixels(64), indices=[2], intermediates_only=True)[0]
    assert distance(expert(pixels(64)), expected) < 1e-5


def test_timm_that_does_not_fit(tmp_path):
    path = tmp_path / "resnet18.pth"
    state = timm.create_model("resnet18").state_dict()
    save({key: value for key, value in state.items() if key != "conv1.weight"}, path)
    with pytest.raises(ValueError, match=r"do not fit timm:resnet18.*Missing.*conv1.weight"):
        load_original(spec_of("timm:resnet18", 64), path)
    save(state, path)
    with pytest.raises(ValueError, match=r"resnet18.pth.*do not fit timm:resnet34.*layer1.2"):
        load_original(spec_of("timm:resnet34", 64), path)
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ValueError, match="weights of resnet18.*is a resnet34.*kind: timm:resnet18"):
        find_original(spec_of("timm:resnet34", 64), path)
