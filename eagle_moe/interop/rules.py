"""Where each library's own keys of a vision encoder belong in our expert.

Keys are relative to the encoder as the library names it; the same rules serve the library's
checkpoints and the official Eagle releases, whose towers are these encoders. Sources: the state
dicts of transformers, timm, open_clip, facebookresearch/segment-anything, and baaivision/EVA
(EVA-02/det).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from eagle_moe.interop.keymap import Rule, ignored

CACHED = ignored(r".*(position_ids|freqs_cos|freqs_sin)", "a table that is computed, not learned")


_CLIP = r"(?:vision_model\.)?"
"""What older releases of transformers, and its models with a text tower, put before the keys."""


def clip(arch: Any) -> list[Rule]:
    """transformers' `CLIPVisionModel`. `pre_layrnorm` is spelled so there."""
    return [
        Rule(rf"{_CLIP}embeddings\.patch_embedding\.weight", "patch_embedding.weight"),
        *_clip_cls(
            arch.keep_cls,
            rf"{_CLIP}embeddings\.class_embedding",
            rf"{_CLIP}embeddings\.position_embedding\.weight",
        ),
        Rule(rf"{_CLIP}pre_layrnorm\.(.+)", r"pre_layernorm.\1"),
        Rule(rf"{_CLIP}encoder\.layers\.(.+)", r"layers.\1"),
        ignored(rf"{_CLIP}post_layernorm\..+", "comes after the map that is read"),
        CACHED,
    ]


def _clip_cls(keep: bool, cls: str, table: str) -> list[Rule]:
    """`cls`, `table`: patterns of the library's keys for the CLS token and the positions."""
    if keep:
        return [Rule(cls, "class_embedding"), Rule(table, "position_embedding")]
    return [
        ignored(cls, "no CLS token takes part (arch.keep_cls: false)"),
        Rule(table, "position_embedding", without_first_row),
    ]


def open_clip_vit(arch: Any) -> list[Rule]:
    """open_clip's `VisionTransformer`, its fused projections cut by `OPEN_CLIP_FUSED`."""
    layer = r"transformer\.resblocks\.(\d+)\."
    renamed = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn": "self_attn",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    return [
        Rule(r"conv1\.weight", "patch_embedding.weight"),
        *_clip_cls(arch.keep_cls, "class_embedding", "positional_embedding"),
        Rule(r"ln_pre\.(.+)", r"pre_layernorm.\1"),
        *(Rule(rf"{layer}{re.escape(k)}\.(.+)", rf"layers.\1.{v}.\2") for k, v in renamed.items()),
        ignored(r"(ln_post\..+|proj)", "comes after the map that is read"),
    ]


def convnext(arch: Any) -> list[Rule]:
    """timm's `ConvNeXt`; the official release stores a block's layer scale as `weight`."""
    return [
        Rule(r"(stages\.\d+\.blocks\.\d+)\.(?:weight|gamma)", r"\1.gamma"),
        Rule(r"((?:stem|stages)\..+)", r"\1"),
        ignored(r"(head|norm_pre)\..+", "comes after the map that is read"),
    ]


def eva02(arch: Any) -> list[Rule]:
    """The `backbone.net` of EVA-02's detector; biases of queries and values are kept apart."""
    return [
        Rule(r"patch_embed\.proj\.(.+)", r"patch_embed.\1"),
        Rule(r"pos_embed", "pos_embed", without_cls_cell),
        Rule(r"blocks\.(\d+)\.attn\.([qv])_bias", r"layers.\1.attn.\2_proj.bias"),
        CACHED,
        Rule(r"blocks\.(.+)", r"layers.\1"),
    ]


def sam(arch: Any) -> list[Rule]:
    """The vision encoder of transformers' `SamModel`."""
    return [
        Rule(r"pos_embed", "pos_embed", flat_cells),
        Rule(r"patch_embed\.projection\.(.+)", r"patch_embed.\1"),
        Rule(r"layers\.(\d+)\.layer_norm([12])\.(.+)", r"layers.\1.norm\2.\3"),
        Rule(r"layers\.(.+)", r"layers.\1"),
        *_sam_neck(arch.neck, ("conv1", "layer_norm1", "conv2", "layer_norm2")),
    ]


def segment_anything(arch: Any) -> list[Rule]:
    """segment_anything's `ImageEncoderViT`."""
    return [
        Rule(r"pos_embed", "pos_embed", flat_cells),
        Rule(r"patch_embed\.proj\.(.+)", r"patch_embed.\1"),
        Rule(r"blocks\.(.+)", r"layers.\1"),
        *_sam_neck(arch.neck, ("0", "1", "2", "3")),
    ]


def _sam_neck(neck: str, names: tuple[str, ...]) -> list[Rule]:
    """`names`: the library's, of the neck's convolutions and norms in order."""
    kept = {"original": 4, "short": 2, "none": 0}[neck]
    found = [rf"neck\.{re.escape(name)}\.(.+)" for name in names]
    ours = ("conv1", "norm1", "conv2", "norm2")
    return [
        *(Rule(found[i], rf"neck.{ours[i]}.\1") for i in range(kept)),
        *(ignored(found[i], f"not in our neck (arch.neck: {neck})") for i in range(kept, 4)),
    ]


def pix2struct(arch: Any) -> list[Rule]:
    """transformers' `Pix2StructVisionModel`."""
    return [
        Rule(r"embeddings\.((?:patch_projection|row_embedder|column_embedder)\..+)", r"\1"),
        Rule(r"encoder\.layer\.(.+)", r"layers.\1"),
        Rule(r"(layernorm\..+)", r"\1"),
    ]


def dinov2(arch: Any) -> list[Rule]:
    """transformers' `Dinov2Model` and `Dinov2WithRegistersModel` (which it renames in memory)."""
    layer = r"encoder\.layer\.(\d+)\."
    renamed = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "mlp.weights_out": "mlp.down_proj",
    }
    return [
        ignored(r"embeddings\.mask_token", "only pretraining masks patches"),
        Rule(r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embedding.\1"),
        Rule(r"embeddings\.(cls_token)", r"\1", first_token),
        Rule(r"embeddings\.(register_tokens|position_embeddings)", r"\1", first_of_batch),
        *(Rule(rf"{layer}{re.escape(k)}\.(.+)", rf"layers.\1.{v}.\2") for k, v in renamed.items()),
        Rule(r"encoder\.layer\.(.+)", r"layers.\1"),
        Rule(r"(layernorm\..+)", r"\1"),
    ]


Fused = dict[str, tuple[str, ...]]
"""Pattern of a key -> what the equal parts of its tensor, along the first axis, are called."""

DINOV2_FUSED: Fused = {
    r"(.+\.mlp)\.weights_in\.(.+)": (r"\1.gate_proj.\2", r"\1.up_proj.\2"),
}
OPEN_CLIP_FUSED: Fused = {
    r"(.+\.attn)\.in_proj_(.+)": (r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2"),
}

EAGLE: dict[str, Callable[[Any], list[Rule]]] = {
    "clip": clip,
    "convnext": convnext,
    "eva02": eva02,
    "sam": sam,
    "pix2struct": pix2struct,
}
"""Kind of expert -> rules of its tower in an official Eagle release, for the expert's `arch`."""


def projector() -> list[Rule]:
    """LLaVA's `mm_projector`: an MLP, or a single linear layer; ours is a connector of the kind."""
    return [
        Rule(r"(\d+\..+)", r"layers.\1"),
        Rule(r"(weight|bias)", r"layers.0.\1"),
    ]


def without_first_row(table: Tensor) -> Tensor:
    """Position table (1+n, C) -> (n, C): the CLS token's row goes."""
    return table[1:]


def without_cls_cell(table: Tensor) -> Tensor:
    """Position table (1, 1+n, C) -> (n, C): the CLS token's row goes."""
    return table[0, 1:]


def flat_cells(table: Tensor) -> Tensor:
    """Position table (1, h, w, C) -> (h*w, C)."""
    return table.flatten(0, 2)


def first_of_batch(tokens: Tensor) -> Tensor:
    """Tokens (1, n, C) -> (n, C)."""
    return tokens[0]


def first_token(tokens: Tensor) -> Tensor:
    """A token (1, 1, C) -> (C)."""
    return tokens[0, 0]
