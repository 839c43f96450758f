"""Recognising an original checkpoint, and what is said of one that is none.

The formats themselves: test_interop_originals_transformers, test_interop_originals_detection and
test_interop_named.
"""

import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from eagle_moe.experts import EXPERTS, build_expert, resolve_expert
from eagle_moe.interop.originals import FORMATS, Original, find_original, load_original
from eagle_moe.interop.shards import Shard
from tests.originals import spec_of

SPEC = resolve_expert("clip-tiny")


def own_weights():
    return {key: value.contiguous() for key, value in build_expert(SPEC).state_dict().items()}


def test_every_kind_of_expert_here_has_formats():
    ours = {kind for kind in EXPERTS if EXPERTS[kind].__module__.startswith("eagle_moe.")}
    assert set(FORMATS) == ours


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_bare_file_in_our_own_layout_will_do(tmp_path, ending):
    given, path = own_weights(), tmp_path / f"mine{ending}"
    save_file(given, path) if ending == ".safetensors" else torch.save(given, path)
    read = load_original(SPEC, path)
    assert read.keys() == given.keys()
    assert all(torch.equal(read[key], given[key]) for key in given)
    given.pop("pre_layernorm.weight")
    torch.save(given, path.with_suffix(".pth"))
    with pytest.raises(ValueError, match="nothing in the file for: pre_layernorm.weight"):
        load_original(SPEC, path.with_suffix(".pth"))


def test_dtypes_are_as_in_the_file(tmp_path):
    save_file({k: v.half() for k, v in own_weights().items()}, tmp_path / "mine.safetensors")
    read = load_original(SPEC, tmp_path / "mine.safetensors")
    assert {value.dtype for value in read.values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["clip", "convnext", "eva02", "pix2struct", "dinov2"])
def test_the_file_of_another_kind_is_named_with_what_would_do(tmp_path, kind):
    path = tmp_path / "sam_vit_l.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 4, 4, 8)}, path)
    spec = spec_of(kind, {"clip": 336, "pix2struct": 720, "dinov2": 448}.get(kind, 1024))
    with pytest.raises(ValueError) as error:
        find_original(spec, path)
    message = str(error.value)
    assert message.startswith(f"{path}: not what the expert `{kind}` (kind `{kind}`) can start")
    assert FORMATS[kind][0].title in message and "image_encoder.pos_embed" in message
    assert "open_clip:<model>" in message


def test_an_expert_of_somebody_else_starts_from_our_layout_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(FORMATS, "clip")
    save_file(own_weights(), tmp_path / "mine.safetensors")
    assert load_original(SPEC, tmp_path / "mine.safetensors")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="which is: an expert's weights in this project's layout"):
        find_original(SPEC, tmp_path / "other.pth")


def full_size_sam():
    return pytest.importorskip("segment_anything").build_sam_vit_l()


def full_size_convnext():
    return timm.create_model("convnext_xxlarge", num_classes=1000)


@pytest.mark.parametrize(
    ("preset", "build"), [("sam", full_size_sam), ("convnext", full_size_convnext)]
)
def test_full_size_presets_fit_their_libraries_models(preset, build):
    """Every key and shape, on the meta device; the others are held to by the golden layout."""
    with torch.device("meta"):
        state = build().state_dict()
        expert = build_expert(resolve_expert(preset))
    shard = Shard(Path("w.pth"), {key: tuple(v.shape) for key, v in state.items()}, {})
    plan = Original(expert, Path("w.pth"), (shard,), FORMATS[preset][0]).plan()
    assert plan.placed.keys() | plan.ignored.keys() == state.keys()
    assert {name for name, _ in plan.placed.values()} == set(expert.state_dict())


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path):
    path, witness = tmp_path / "sam_vit_l.pth", tmp_path / "ran"
    torch.save({"model": own_weights(), "args": Code(witness)}, path)
    with pytest.raises(ValueError, match=r"sam_vit_l.pth: refused \(posix.system\)"):
        load_original(SPEC, path)
    assert not witness.exists()


def test_damage_is_named_before_anything_is_built(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(own_weights(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read .*Copy it again"):
        find_original(SPEC, tmp_path)
