"""`timm:` experts against timm's own forward pass, and what a wrong name or option says."""

import pytest
import timm
import torch

from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.experts.check import distance
from tests.parity import randomise

VIT = "vit_tiny_patch16_224"


def load(expert, theirs):
    """timm's weights into `expert`; heads are left over, nothing may be missing."""
    missing = expert.body.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert not missing
    return expert.eval()


@torch.no_grad()
def test_convolutional_model():
    theirs = randomise(timm.create_model("resnet18", pretrained=False))
    entry = {"kind": "timm:resnet18", "view": {"size": 64}}
    expert = load(build_expert(resolve_expert(entry)), theirs)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = theirs.forward_features(pixels)
    assert (expert.channels, expert.stride) == (512, 32)
    assert distance(expert(pixels), expected) < 1e-5
    # BatchNorm is frozen: training mode changes nothing (and a batch statistic would).
    assert distance(expert.train()(pixels), expected) < 1e-5
    assert distance(theirs.train().forward_features(pixels), expected) > 1e-2


@torch.no_grad()
def test_transformer_with_norm_at_another_size():
    theirs = randomise(timm.create_model(VIT, pretrained=False, depth=2, img_size=64))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tokens = theirs.forward_features(pixels)[:, 1:]
    expected = tokens.transpose(1, 2).unflatten(2, (4, 4))
    entry = {"kind": f"timm:{VIT}", "view": {"size": 64}}
    for norm in (True, False):
        arch = {"norm": norm, "options": {"depth": 2}}
        expert = load(build_expert(resolve_expert({**entry, "arch": arch})), theirs)
        assert (distance(expert(pixels), expected) < 1e-5) == norm


def test_earlier_layer_drops_the_later_ones():
    arch = {"layer": 0, "options": {"depth": 3}}
    entry = {"kind": f"timm:{VIT}", "view": {"size": 32}, "arch": arch}
    expert = build_expert(resolve_expert(entry))
    assert len(expert.body.blocks) == 1
    assert expert(torch.randn(1, 3, 32, 32)).shape == (1, 192, 2, 2)


def test_defaults_come_from_the_named_weights():
    spec = resolve_expert("timm:vit_base_patch16_dinov3.lvd1689m")
    assert spec.view.size == 256
    assert spec.card.checkpoint == "timm/vit_base_patch16_dinov3.lvd1689m"
    assert spec.card.licence == "dinov3-license"
    assert spec.name == "timm_vit_base_patch16_dinov3_lvd1689m"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("timm:resnet81", 'no model "resnet81".*Did you mean "resnet18"'),
        (f"timm:{VIT}.foo", f"With weights: {VIT}.augreg_in21k"),
        ({"kind": f"timm:{VIT}", "view": {"size": 60}}, "view.size 60 is not a multiple"),
        ({"kind": "timm:resnet18", "arch": {"layer": 9}}, "arch.layer 9 is not one of the 5"),
        ({"kind": f"timm:{VIT}", "arch": {"options": {"deph": 2}}}, "arch.options.*deph"),
        ({"kind": f"timm:{VIT}", "arch": {"option": {}}}, 'Did you mean "options"'),
    ],
)
def test_bad_input(entry, message):
    with pytest.raises(ValueError, match=message):
        build_expert(resolve_expert(entry))
