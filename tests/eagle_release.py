"""The official Eagle release's numbers (see `test_experts_golden`) and their way into our experts.

The files lie outside the repository; `EAGLE_MOE_GOLDENS` names their folder.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle_moe.canvas import CLIP_MEAN, CLIP_STD
from eagle_moe.experts import VisionExpert, build_expert, resolve_expert

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(os.environ.get("EAGLE_MOE_GOLDENS", ROOT.parent / "shared/goldens/eagle-release"))
needs_goldens = pytest.mark.skipif(
    not (GOLDENS / "config.json").is_file(),
    reason=f"no golden data in {GOLDENS}; name its folder in EAGLE_MOE_GOLDENS",
)

# The release's own views: CLIP's statistics for everybody, bilinear between corners, no antialias.
RELEASE_VIEW = {"mean": CLIP_MEAN, "std": CLIP_STD, "align_corners": True, "antialias": False}

# Official key -> ours, first match wins; None drops what the official forward never uses.
CLIP_KEYS = [
    (r"vision_model\.embeddings\.patch_embedding", "patch_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "position_embedding"),
    (r"vision_model\.embeddings\.class_embedding", "class_embedding"),
    (r"vision_model\.pre_layrnorm", "pre_layernorm"),
    (r"vision_model\.encoder\.layers", "layers"),
    (r"vision_model\.post_layernorm.*", None),
]
CONVNEXT_KEYS = [(r"(stages\.\d+\.blocks\.\d+)\.weight", r"\1.gamma"), (r"head\..*", None)]
EVA_KEYS = [
    (r"patch_embed\.proj", "patch_embed"),
    (r"^blocks(.*)\.(q|v)_bias", r"layers\1.\2_proj.bias"),
    (r"^blocks", "layers"),
]
SAM_KEYS = [
    (r"patch_embed\.projection", "patch_embed"),
    (r"neck\.layer_norm1", "neck.norm1"),
    (r"layer_norm(\d)", r"norm\1"),
]
PIX_KEYS = [(r"embeddings\.", ""), (r"encoder\.layer\.", "layers.")]
KEYS = {
    "clip": CLIP_KEYS,
    "convnext": CONVNEXT_KEYS,
    "eva02": EVA_KEYS,
    "sam": SAM_KEYS,
    "pix2struct": PIX_KEYS,
}


def read(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{name}.safetensors")


def config(*path: str) -> dict:
    node = json.loads((GOLDENS / "config.json").read_text())
    for key in path:
        node = node[key]
    return node


def load(expert: VisionExpert, tensors: dict[str, torch.Tensor], prefix: str) -> VisionExpert:
    """Put the official weights below `prefix` in their places; every key must find one."""
    kind = expert.spec.kind
    state = {}
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        name: str | None = key.removeprefix(prefix)
        for pattern, replacement in KEYS[kind]:
            if re.search(pattern, name):
                name = re.sub(pattern, replacement, name) if replacement is not None else None
                break
        if name is not None:
            state[name] = value
    if kind == "clip" and not expert.arch.keep_cls:
        del state["class_embedding"]
        state["position_embedding"] = state["position_embedding"][1:]
    elif kind == "eva02":
        state["pos_embed"] = state["pos_embed"][0, 1:]
    elif kind == "sam":
        state["pos_embed"] = state["pos_embed"].flatten(0, 2)
    expert.load_state_dict(state, strict=True)
    return expert.eval()


def build(kind: str, size: int, arch: dict) -> VisionExpert:
    view = {"size": size} if kind == "pix2struct" else {"size": size, **RELEASE_VIEW}
    card = {"checkpoint": "", "licence": "unknown", "source": "test"}
    entry = {"kind": kind, "view": view, "arch": arch, "card": card}
    return build_expert(resolve_expert(entry))


def clip_arch(c: dict, keep_cls: bool = False) -> dict:
    return {
        "image_size": c["image"],
        "hidden_size": c["hidden"],
        "layers": c["layers"],
        "heads": c["heads"],
        "mlp_size": c["inter"],
        "keep_cls": keep_cls,
    }


def eva_arch(c: dict, global_layers: Iterable[int]) -> dict:
    return {
        "hidden_size": c["embed"],
        "layers": c["depth"],
        "heads": c["heads"],
        "mlp_size": int(c["embed"] * 8 / 3),
        "window": c["window"],
        "global_layers": list(global_layers),
    }


def sam_arch(c: dict) -> dict:
    return {
        "image_size": c["image"],
        "hidden_size": c["hidden"],
        "layers": c["layers"],
        "heads": c["heads"],
        "mlp_size": c["mlp_dim"],
        "window": c["window"],
        "global_layers": c["global"],
        "neck_channels": c["out"],
    }


def pix_arch(c: dict) -> dict:
    return {
        "hidden_size": c["hidden"],
        "layers": c["layers"],
        "heads": c["heads"],
        "head_dim": c["d_kv"],
        "mlp_size": c["d_ff"],
        "table_size": c["seq_len"],
    }
