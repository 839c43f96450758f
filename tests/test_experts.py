"""The registry: every preset is swept; names, overrides and mistakes in entries."""

import pytest
import torch

from eagle_moe.experts import EXPERTS, build_expert, presets, resolve_expert

TINY = sorted(name for name in presets() if name.endswith("-tiny"))
# Millions of parameters and the map, as measured on the official full-size modules (CLIP without
# its final norm, which no map depends on; ConvNeXt without its head).
FULL = {
    "clip": (303.505, (1024, 24, 24)),
    "convnext": (843.392, (3072, 32, 32)),
    "sam": (307.688, (1024, 32, 32)),
    "eva02": (303.388, (1024, 64, 64)),
    "pix2struct": (512.812, (1536, 45, 45)),
    "dinov2": (304.372, (1024, 32, 32)),
    "clip-448": (303.505, (1024, 32, 32)),
}


def millions(expert):
    return sum(p.numel() for p in expert.parameters()) / 1e6


def test_every_kind_has_a_tiny_preset():
    """Or the sweep (here and in test_experts_check) would not see it."""
    kinds = {presets()[name][0] for name in TINY}
    assert kinds == {kind for kind in EXPERTS if not kind.endswith(":")}


@pytest.mark.parametrize("name", sorted(set(presets()) - set(TINY)))
def test_full_size_on_meta(name):
    with torch.device("meta"):
        expert = build_expert(resolve_expert(name))
        view = torch.empty(1, 3, expert.view_spec.size, expert.view_spec.size)
        seen = expert(view)
    assert all(p.is_meta for p in expert.parameters())
    shape = (expert.channels, *[expert.view_spec.size // expert.stride] * 2)
    assert tuple(seen.shape[1:]) == shape
    if name in FULL:
        assert (pytest.approx(millions(expert), abs=0.001), shape) == FULL[name]


def test_experts_of_x5_sum_to_the_reference():
    x5 = ("clip", "convnext", "sam", "eva02", "pix2struct")
    assert sum(FULL[name][0] for name in x5) == pytest.approx(2270.8, abs=0.1)


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets(name):
    """8 x 8 cells of a 64 px canvas, a third of a million parameters, activations of order one."""
    torch.manual_seed(0)
    expert = build_expert(resolve_expert(name))
    canvas = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        seen = expert(expert.view(canvas))
    assert seen.shape == (2, expert.channels, 8, 8)
    assert 0.3 < millions(expert) < 0.4
    assert 0.1 < seen.std() < 10


@pytest.mark.parametrize("name", TINY)
def test_one_cell_sees_its_part_of_the_canvas(name):
    """A change at the top right moves the map at the top right: no axis is swapped."""
    torch.manual_seed(0)
    expert = build_expert(resolve_expert(name)).eval()
    canvas = torch.randint(100, 156, (1, 3, 64, 64), dtype=torch.uint8)
    other = canvas.clone()
    other[..., 2:6, 50:54] = 255
    with torch.no_grad():
        moved = (expert(expert.view(canvas)) - expert(expert.view(other))).norm(dim=1)[0]
    middle = torch.arange(8.0) - 3.5
    assert (moved.sum(1) * middle).sum() < 0 < (moved.sum(0) * middle).sum()


def test_resolved_spec_resolves_to_itself():
    for name in presets():
        spec = resolve_expert(name)
        assert resolve_expert(spec.dump()) == spec


def test_overrides_keep_the_rest_of_the_preset():
    entry = {"preset": "sam-tiny", "name": "mask", "view": {"size": 96}, "arch": {"layers": 1}}
    spec = resolve_expert(entry)
    assert spec.name == "mask"
    assert spec.view.size == 96
    assert spec.view.mean == resolve_expert("sam-tiny").view.mean
    assert spec.arch["layers"] == 1
    assert spec.arch["window"] == 4
    assert build_expert(spec)(torch.randn(1, 3, 96, 96)).shape == (1, 48, 12, 12)


def test_init_is_reproducible_and_leaves_loaded_weights_alone():
    spec = resolve_expert("sam-tiny")
    torch.manual_seed(0)
    first = build_expert(spec)
    torch.manual_seed(0)
    second = build_expert(spec)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    second.pos_embed._is_hf_initialized = True  # how transformers marks a loaded tensor
    before = second.pos_embed.clone(), second.patch_embed.weight.clone()
    second.apply(second.init_weights)
    assert torch.equal(second.pos_embed, before[0])
    assert not torch.equal(second.patch_embed.weight, before[1])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("clp", 'no expert "clp". Did you mean "clip"'),
        ({"kind": "sm"}, 'no vision expert of kind "sm". Did you mean "sam"'),
        ({"name": "eyes"}, "expert eyes: give `preset`"),
        ({"preset": "clip", "veiw": {"size": 3}}, 'unknown key `veiw`. Did you mean "view"'),
        ({"preset": "clip", "view": {"sise": 3}}, "sise"),
        ({"preset": "clip", "arch": {"layer": 3}}, 'unknown key `layer`. Did you mean "layers"'),
        ({"preset": "clip", "arch": {"layers": "many"}}, "`layers`"),
        ({"preset": "sam", "arch": {"neck": "long"}}, "`neck`"),
        ({"preset": "clip", "view": {"size": 225}}, "Set view.size to 224 or 238"),
        ({"preset": "dinov2", "view": {"size": 7}}, "Set view.size to 14 or 28"),
        ({"preset": "eva02", "view": {"size": 1000}}, "Set view.size to 992 or 1008"),
        ({"preset": "pix2struct", "view": {"size": 700}}, "Set view.size to 688 or 704"),
        ({"preset": "convnext", "view": {"size": 16}}, "Set view.size to 32 or more"),
    ],
)
def test_bad_entries(entry, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_expert(resolve_expert(entry))


@pytest.mark.parametrize("name", ["clip", "sam", "eva02", "dinov2"])
def test_heads_must_divide_the_width(name):
    with pytest.raises(ValueError, match="arch.heads 7 does not divide"), torch.device("meta"):
        build_expert(resolve_expert({"preset": f"{name}-tiny", "arch": {"heads": 7}}))
