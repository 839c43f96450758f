"""The official Eagle release's own numbers, and our experts and models with its weights.

The golden files hold what the official code gave out on random weights; they lie outside the
repository, in the folder that `EAGLE_MOE_GOLDENS` names. Every size is read from them, so any set
of the same form will do. The weights take the importer's key rules, the rest of the mixtures the
profile `release`: what these numbers prove is what a person gets.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from eagle_moe.config import EagleMixConfig
from eagle_moe.experts import VisionExpert, build_expert, expert_class, resolve_expert
from eagle_moe.fusion import FUSIONS, to_grid
from eagle_moe.interop.eagle_release import release_rules
from eagle_moe.interop.keymap import Plan, Rule, below, make_plan
from eagle_moe.interop.rules import EAGLE
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.profile import read_profile
from tests.parity import distance, look

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(os.environ.get("EAGLE_MOE_GOLDENS", ROOT.parent / "shared/goldens/eagle-release"))
WHY_NOT = f"no golden data in {GOLDENS}; name its folder in EAGLE_MOE_GOLDENS"
HERE = (GOLDENS / "config.json").is_file()
needs_goldens = pytest.mark.skipif(not HERE, reason=WHY_NOT)

# fp32 on other kernels; a wrong detail moves an output by 1e-2 to 5e-1 (the set's README).
RELATIVE, ABSOLUTE = 1e-5, 2e-4
LOGIT, LOSS = 1e-3, 1e-5
WRONG = 100 * RELATIVE
"""Relative L2 that every deliberate mistake must exceed."""

# The official towers in the order of X5, and our kind of each.
KINDS = {
    "clip": "clip",
    "convnext": "convnext",
    "sam": "sam",
    "det": "eva02",
    "pix2struct": "pix2struct",
}
# Golden file of a single tower -> our kind.
SINGLE = {
    "clip": "clip",
    "convnext": "convnext",
    "eva": "eva02",
    "sam": "sam",
    "pix2struct": "pix2struct",
}
X5 = tuple(KINDS)
X4 = tuple(name for name in X5 if name != "sam")

# Field of config.json -> field of our `arch`. What a set does not say is as in the release, whose
# values are our defaults.
ARCH = {
    "image": "image_size",
    "patch": "patch_size",
    "hidden": "hidden_size",
    "embed": "hidden_size",
    "layers": "layers",
    "depth": "layers",
    "depths": "depths",
    "dims": "dims",
    "heads": "heads",
    "d_kv": "head_dim",
    "inter": "mlp_size",
    "mlp_dim": "mlp_size",
    "mlp_hidden": "mlp_size",
    "d_ff": "mlp_size",
    "act": "activation",
    "eps": "norm_eps",
    "window": "window",
    "global": "global_layers",
    "global_blocks": "global_layers",
    "out": "neck_channels",
    "seq_len": "table_size",
    "pretrain_grid": "table_cells",
    "rope_pt_seq_len": "rotary_cells",
}


# The files


def config(*path: str) -> Any:
    node = json.loads((GOLDENS / "config.json").read_text())
    for key in path:
        node = node[key]
    return node


@cache
def read(name: str) -> dict[str, Tensor]:
    """All tensors of a golden file, as they are stored; not to be changed."""
    return load_file(GOLDENS / f"{name}.safetensors")


def outputs(name: str, inputs: str) -> list[str]:
    """Names of the tensors of a file that are neither weights nor match `inputs`: its results.

    For use while a test file is imported: without golden data the whole file is skipped.
    """
    if not HERE:
        pytest.skip(WHY_NOT, allow_module_level=True)
    with safe_open(GOLDENS / f"{name}.safetensors", framework="pt") as file:
        return [key for key in file.keys() if not re.fullmatch(rf"weight\..+|{inputs}", key)]  # noqa: SIM118


def groups(names: Iterable[str]) -> list[str]:
    """What the names of images start with, such as `px42` and `img0`, by their number."""
    found = {match[0] for name in names if (match := re.match(r"[a-z]+\d+(?=\.)", name))}
    return sorted(found, key=lambda group: int(re.sub(r"\D", "", group)))


# Our side


def arch(kind: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Our architecture options for an expert's part of config.json."""
    if kind == "eva02":
        rules = {
            "mlp_hidden": int(sizes["embed"] * 8 / 3),
            "global_blocks": list(range(2, sizes["depth"], 3)),
        }
        sizes = {**rules, **sizes}
    known = expert_class(kind).Arch.model_fields  # the activations of SAM and Pix2Struct are fixed
    return {
        ours: sizes[theirs] for theirs, ours in ARCH.items() if theirs in sizes and ours in known
    }


def entry(kind: str, size: int | None, sizes: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """An expert in `size` pixels (None: as the profile says) as the release shows it its view."""
    given = {
        "preset": kind,
        "view": {} if size is None else {"size": size},
        "arch": {**arch(kind, sizes), **options},
    }
    return read_profile("release").fill({"experts": [given]})["experts"][0]


def load(
    module: nn.Module, weights: Mapping[str, Tensor], rules: Sequence[Rule], only: str = ""
) -> Plan:
    """Put official weights in their places, `only` where our names match; eval mode follows."""
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    expected = {
        key: tuple(value.shape) for key, value in module.state_dict().items() if re.match(only, key)
    }
    plan = make_plan(shapes, rules, expected, "golden weights")
    placed = (plan.place(key, value) for key, value in weights.items())
    module.load_state_dict(dict(pair for pair in placed if pair is not None), strict=not only)
    module.eval()
    return plan


def tower(file: str, group: str, **options: Any) -> VisionExpert:
    """The expert of a golden file of its own, for the view of one `group` such as `px42`.

    `options`: of its architecture, beside those of the release.
    """
    golden, sizes = read(file), config(file)
    size = int(group.removeprefix("px"))
    if "max_patches" in sizes:  # Pix2Struct: as many whole patches as that allows, of any image
        size = math.isqrt(sizes["max_patches"]) * sizes["patch"]
    kind = SINGLE[file]
    expert = build_expert(resolve_expert(entry(kind, size, sizes, **options)))
    load(expert, official(golden), below(EAGLE[kind](expert.arch), "vision_tower."))
    table = golden.get(f"{group}.pos_embed_override")
    if table is not None:  # a view that SAM cannot see in the release
        expert.pos_embed = nn.Parameter(table.flatten(0, 2))
    return expert


def official(tensors: Mapping[str, Tensor], towers: Sequence[str] = X5) -> dict[str, Tensor]:
    """The weights of a golden file, under the keys of a release with these `towers` of X5."""
    weights = {}
    for key, value in tensors.items():
        if not key.startswith("weight."):
            continue
        name = key.removeprefix("weight.")
        if match := re.fullmatch(r"(?:model\.vision_tower\.)?vision_towers\.(\d+)\.(.+)", name):
            tower = X5[int(match[1])]
            if tower not in towers:
                continue
            name = f"model.vision_tower.vision_towers.{towers.index(tower)}.{match[2]}"
        elif name.startswith("mm_projector."):
            name = f"model.{name}"
        weights[name] = value
    return weights


def release_model(
    vision: Mapping[str, Any],
    grid: int,
    text_config: Mapping[str, Any],
    towers: Sequence[str] = X5,
    image_token_id: int = 0,
) -> EagleMixForConditionalGeneration:
    """A mixture by its part of config.json, in the profile `release`; weights still random."""
    sizes = {
        "clip": (vision["clip_input"], vision["clip"]),
        "convnext": (vision["input"], vision["convnext"]),
        "sam": (vision["input"], vision["sam"]),
        "det": (vision["input"], vision["eva"]),
        "pix2struct": (None, vision["pix"]),
    }
    profile = read_profile("release")
    text = {"model_type": "llama", "max_position_embeddings": 4096, **text_config}
    return EagleMixForConditionalGeneration(
        EagleMixConfig(
            vision_config={
                "canvas_size": vision["input"],
                "experts": [entry(KINDS[name], *sizes[name]) for name in towers],
                "fusion": {**profile.fusion, "grid": grid},
            },
            text_config=text,
            connector=profile.connector,
            image_token_id=image_token_id,
        )
    )


def mixture(name: str, towers: Sequence[str] = X5) -> EagleMixForConditionalGeneration:
    """The mixture of a golden file with its weights; what the file lacks stays random: the language
    model, and the projector of any mixture but X5."""
    golden, vision = read(name), config(name, "cfg")
    width = golden["projector.output"].shape[-1]
    text = {
        "hidden_size": width,
        "num_attention_heads": 1,
        "num_hidden_layers": 0,
        "intermediate_size": width,
        "vocab_size": 3,  # transformers: BOS is 1, EOS 2
    }
    model = release_model(vision, math.isqrt(golden["x5.features"].shape[1]), text, towers)
    weights, ours = official(golden, towers), r"model\.(vision_tower|multi_modal_projector)\."
    if towers != X5:
        weights = {key: value for key, value in weights.items() if "mm_projector" not in key}
        ours = r"model\.vision_tower\."
    load(model, weights, release_rules(model.config, text["vocab_size"]), only=ours)
    return model


def mixture_canvas(name: str) -> Tensor:
    """The image that a golden mixture sees, made by the README's formula where it is not stored."""
    golden = read(name)
    if "input_u8" in golden:
        return golden["input_u8"]
    base, size = golden["input_base_u8"], config(name, "cfg", "input")
    times = size // base.shape[-1]
    image = base.repeat_interleave(times, 2).repeat_interleave(times, 3).int()
    c, y, x = torch.meshgrid(*map(torch.arange, (3, size, size)), indexing="ij")
    wave = (7 * y + 13 * x + 5 * c) % 23 - 11
    return (image + wave).clamp(0, 255).to(torch.uint8)


# Layouts of the golden tensors, from our maps (B,C,h,w)


def bnc(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def bhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def on_grid(x: Tensor, cells: int) -> Tensor:
    """A map (B,C,h,w) on a grid of so many cells per side, by the release's rule."""
    options = {**read_profile("release").fusion, "grid": cells}
    kind = FUSIONS[options.pop("kind")]
    return to_grid(x, kind.Options.parse(options, "profile"))


def on_grids(x: Tensor, golden: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Our map on every grid that the golden has it on: the tensors `<group>.gridK`."""
    return {
        name: bnc(on_grid(x, int(match[1])))[: value.shape[0]]
        for name, value in golden.items()
        if (match := re.fullmatch(rf"{group}\.grid(\d+)", name))
    }


def as_output(x: Tensor, golden: Tensor) -> Tensor:
    """A map as an official tower gives it out: tokens, or a map, which Pix2Struct's resizes."""
    return bnc(x) if golden.ndim == 3 else on_grid(x, golden.shape[-1])


def output_error(expert: VisionExpert, file: str, group: str) -> float:
    """Distance of an expert's map to that of its own golden file."""
    golden = read(file)
    x = look(expert, golden[f"{group}.input_u8"])
    return distance(as_output(x, golden[f"{group}.output"]), golden[f"{group}.output"])


# Comparison


def assert_same(ours: Tensor, golden: Tensor) -> None:
    """Integers exactly, features within the tolerance of the golden set's README."""
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    if not golden.is_floating_point():
        assert torch.equal(ours.to(golden.dtype), golden)
        return
    assert distance(ours, golden) <= RELATIVE
    assert (ours - golden).abs().max() <= ABSOLUTE
