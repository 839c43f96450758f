"""Profiles: the same mixture as the release does it, and as its experts were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from eagle_moe.build import ModelSpec, build_config, load_model_spec
from eagle_moe.canvas import CLIP_MEAN, IMAGENET_MEAN
from eagle_moe.experts import resolve_expert
from eagle_moe.profile import PROFILES, read_profile

ROOT = Path(__file__).parents[1]
X5 = ROOT / "configs/models/eagle-x5-vicuna-7b.yaml"


def experts(profile: str) -> dict:
    spec = load_model_spec(X5, [f"profile={profile}"])
    specs = build_config(spec, 32_000).vision_config.expert_specs
    return {expert.kind: expert for expert in specs}


def test_native_shows_each_expert_what_its_preset_says_and_keeps_its_own_neck():
    native = experts("native")
    for kind, expert in native.items():
        preset = resolve_expert(kind)
        assert expert.view == preset.view
        changed = {key for key, value in expert.arch.items() if preset.arch[key] != value}
        assert changed == ({"neck"} if kind == "sam" else set())
    assert native["sam"].arch["neck"] == "original"
    assert native["sam"].view.mean == native["eva02"].view.mean == IMAGENET_MEAN


def test_release_shows_every_expert_the_pixels_of_clip():
    release = experts("release")
    assert {expert.view.mean for expert in release.values()} == {CLIP_MEAN}
    assert release["clip"].view.size == 336
    assert release["clip"].arch["keep_cls"] is False
    assert release["sam"].arch["neck"] == "short"


def test_the_model_file_has_the_last_word_and_the_result_fills_to_itself():
    entry = {"preset": "clip", "name": "low", "view": {"size": 224}, "arch": {"keep_cls": True}}
    spec = load_model_spec(X5).dump()
    spec["experts"] = [entry, "sam", "timm:vit_tiny_patch16_224"]
    spec["canvas"] = {"fit": "crop"}
    filled = ModelSpec.parse(spec, "spec")
    clip, sam, other = filled.experts
    assert (clip["view"]["size"], clip["view"]["align_corners"]) == (224, True)
    assert clip["arch"] == {"keep_cls": True}
    assert sam["arch"]["neck"] == "short"
    assert other == {"kind": "timm:vit_tiny_patch16_224"}
    assert (filled.canvas.fit, filled.canvas.size) == ("crop", 1024)
    assert ModelSpec.parse(filled.dump(), "dumped") == filled


def test_a_model_file_without_a_profile_is_left_alone():
    spec = ModelSpec.parse({"experts": ["clip"], "language_model": {"checkpoint": "a"}}, "spec")
    assert spec.experts == ["clip"]


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_profile_holds_only_fields_that_exist(path):
    profile = read_profile(path.stem)
    spec = load_model_spec(X5, [f"profile={path.stem}"])
    assert set(profile.experts) <= {expert.kind for expert in experts(path.stem).values()}
    build_config(spec, 32_000)


def test_mistakes_name_the_profile_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r'profile: no "relase".*"release".*native, release'):
        load_model_spec(X5, ["profile=relase"])
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"experts": {"clip": {"veiw": {}}}}))
    with pytest.raises(ValueError, match=r"mine.yaml: unknown key `experts.clip.veiw`.*view"):
        load_model_spec(X5, [f"profile={path}"])
    path.write_text(yaml.safe_dump({"experts": {"clip": {"arch": {"head": 3}}}}))
    with pytest.raises(ValueError, match=r"unknown key `head`.*heads"):
        build_config(load_model_spec(X5, [f"profile={path}"]), 32_000)
