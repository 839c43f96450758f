"""Keys and shapes of an official Eagle release, at any size.

They are spelt out here as the official modules have them, apart from the importer's rules, so that
the two can be held against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Layout = dict[str, tuple[int, ...]]
X5 = "clip-448;convnext-1024;sam-1024;det-1024;pix2struct-1024"
X4 = "clip-448;convnext-1024;det-1024;pix2struct-1024"


@dataclass(frozen=True)
class Sizes:
    """Defaults: the published sizes on Vicuna-7B. Tuples of a tower: see its function."""

    vocabulary: int = 32_000
    llm: tuple[int, int, int, int] = (4096, 11008, 32, 4096)
    clip: tuple[int, int, int, int, int] = (1024, 4096, 24, 14, 577)
    convnext: tuple[tuple[int, ...], tuple[int, ...]] = ((3, 4, 30, 3), (384, 768, 1536, 3072))
    sam: tuple[int, ...] = (1024, 4096, 24, 64, 64, 14, 256)
    sam_global: tuple[int, ...] = (5, 11, 17, 23)
    eva: tuple[int, ...] = (1024, 2730, 24, 64, 64, 16)
    eva_global: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23)
    pix2struct: tuple[int, ...] = (1536, 1536, 3968, 18, 4096)
    config: dict[str, Any] = field(default_factory=dict)


TINY = Sizes(
    llm=(32, 64, 2, 16),
    clip=(16, 24, 2, 14, 17),
    convnext=((1, 1, 1, 1), (4, 4, 8, 12)),
    sam=(16, 24, 2, 8, 8, 3, 4),
    sam_global=(1,),
    eva=(16, 42, 3, 8, 8, 3),
    eva_global=(2,),
    pix2struct=(16, 16, 24, 2, 64),
    config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
)

TINY_GEOMETRY = {
    "canvas": {"size": 128},
    "experts": {
        "clip": {
            "view": {"size": 42},
            "arch": {"image_size": 56, "hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 24},
        },
        "convnext": {
            "view": {"size": 128},
            "arch": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 12]},
        },
        "sam": {
            "view": {"size": 128},
            "arch": {
                "image_size": 128,
                "hidden_size": 16,
                "layers": 2,
                "heads": 2,
                "mlp_size": 24,
                "window": 3,
                "global_layers": [1],
                "neck_channels": 4,
            },
        },
        "eva02": {
            "view": {"size": 128},
            "arch": {
                "hidden_size": 16,
                "layers": 3,
                "heads": 2,
                "mlp_size": 42,
                "window": 3,
                "global_layers": [2],
            },
        },
        "pix2struct": {
            "view": {"size": 80},
            "arch": {
                "hidden_size": 16,
                "layers": 2,
                "heads": 2,
                "head_dim": 8,
                "mlp_size": 24,
                "table_size": 64,
            },
        },
    },
    "fusion": {"grid": 4},
}


def layout(sizes: Sizes, towers: str) -> Layout:
    """Every key of a release with these towers, and its shape."""
    width, hidden, layers, kv = sizes.llm
    keys: Layout = {"model.embed_tokens.weight": (sizes.vocabulary, width)}
    for i in range(layers):
        keys |= _below(f"model.layers.{i}.", _llama_layer(width, hidden, kv))
    keys["model.norm.weight"] = (width,)
    channels = 0
    parts = {
        "clip": _clip,
        "convnext": _convnext,
        "sam": _sam,
        "det": _eva,
        "pix2struct": _pix2struct,
    }
    for i, tower in enumerate(towers.split(";")):
        shapes, out = parts[tower.split("-")[0]](sizes)
        keys |= _below(f"model.vision_tower.vision_towers.{i}.vision_tower.", shapes)
        channels += out
    keys |= _below("model.mm_projector.0.", _linear("", width, channels))
    keys |= _below("model.mm_projector.2.", _linear("", width, width))
    keys["lm_head.weight"] = (sizes.vocabulary, width)
    return keys


def _below(prefix: str, keys: Layout) -> Layout:
    return {prefix + key: shape for key, shape in keys.items()}


def _linear(name: str, out: int, into: int) -> Layout:
    dot = f"{name}." if name else ""
    return {f"{dot}weight": (out, into), f"{dot}bias": (out,)}


def _norm(name: str, width: int) -> Layout:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _llama_layer(width: int, hidden: int, kv: int) -> Layout:
    return {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }


def _clip(sizes: Sizes) -> tuple[Layout, int]:
    """(width, MLP, layers, patch, positions)."""
    width, mlp, layers, patch, positions = sizes.clip
    keys: Layout = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
        **_norm("pre_layrnorm", width),
        **_norm("post_layernorm", width),
    }
    for i in range(layers):
        layer = _norm("layer_norm1", width) | _norm("layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer |= _linear(f"self_attn.{name}", width, width)
        layer |= _linear("mlp.fc1", mlp, width) | _linear("mlp.fc2", width, mlp)
        keys |= _below(f"encoder.layers.{i}.", layer)
    return _below("vision_model.", keys), width


def _convnext(sizes: Sizes) -> tuple[Layout, int]:
    """(depths, dims)."""
    depths, dims = sizes.convnext
    keys: Layout = {"stem.0.weight": (dims[0], 3, 4, 4), "stem.0.bias": (dims[0],)}
    keys |= _norm("stem.1", dims[0])
    for stage, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            before = dims[stage - 1]
            keys |= _norm(f"stages.{stage}.downsample.0", before)
            keys[f"stages.{stage}.downsample.1.weight"] = (width, before, 2, 2)
            keys[f"stages.{stage}.downsample.1.bias"] = (width,)
        for block in range(depth):
            layer: Layout = {"weight": (width,), "conv_dw.weight": (width, 1, 7, 7)}
            layer |= {"conv_dw.bias": (width,)} | _norm("norm", width)
            layer |= _linear("mlp.fc1", 4 * width, width) | _linear("mlp.fc2", width, 4 * width)
            keys |= _below(f"stages.{stage}.blocks.{block}.", layer)
    keys |= _norm("head.norm", dims[-1]) | _linear("head.fc", 1000, dims[-1])
    return keys, dims[-1]


def _sam(sizes: Sizes) -> tuple[Layout, int]:
    """(width, MLP, layers, cells, head width, window, neck channels)."""
    width, mlp, layers, cells, head, window, neck = sizes.sam
    keys: Layout = {
        "pos_embed": (1, cells, cells, width),
        "patch_embed.projection.weight": (width, 3, 16, 16),
        "patch_embed.projection.bias": (width,),
        "neck.conv1.weight": (neck, width, 1, 1),
        **_norm("neck.layer_norm1", neck),
    }
    for i in range(layers):
        rows = 2 * (cells if i in sizes.sam_global else window) - 1
        layer = _norm("layer_norm1", width) | _norm("layer_norm2", width)
        layer |= {"attn.rel_pos_h": (rows, head), "attn.rel_pos_w": (rows, head)}
        layer |= _linear("attn.qkv", 3 * width, width) | _linear("attn.proj", width, width)
        layer |= _linear("mlp.lin1", mlp, width) | _linear("mlp.lin2", width, mlp)
        keys |= _below(f"layers.{i}.", layer)
    return keys, 4 * neck


def _eva(sizes: Sizes) -> tuple[Layout, int]:
    """(width, SwiGLU, layers, cells, head width, window)."""
    width, mlp, layers, cells, head, window = sizes.eva
    keys: Layout = {
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        **_rope("rope_win", window, head),
        **_rope("rope_glb", cells, head),
    }
    for i in range(layers):
        layer = _norm("norm1", width) | _norm("norm2", width)
        layer |= {"attn.q_bias": (width,), "attn.v_bias": (width,)}
        layer |= {f"attn.{name}_proj.weight": (width, width) for name in "qkv"}
        layer |= _rope("attn.rope", cells if i in sizes.eva_global else window, head)
        layer |= _linear("attn.proj", width, width)
        layer |= _linear("mlp.w1", mlp, width) | _linear("mlp.w2", mlp, width)
        layer |= _norm("mlp.ffn_ln", mlp) | _linear("mlp.w3", width, mlp)
        keys |= _below(f"blocks.{i}.", layer)
    return keys, width


def _rope(name: str, cells: int, head: int) -> Layout:
    return {f"{name}.freqs_{part}": (cells**2, head) for part in ("cos", "sin")}


def _pix2struct(sizes: Sizes) -> tuple[Layout, int]:
    """(width, heads x head width, MLP, layers, table rows)."""
    width, inner, mlp, layers, rows = sizes.pix2struct
    keys: Layout = {
        **_linear("embeddings.patch_projection", width, 768),
        "embeddings.row_embedder.weight": (rows, width),
        "embeddings.column_embedder.weight": (rows, width),
        "layernorm.weight": (width,),
    }
    for i in range(layers):
        layer: Layout = {f"attention.{n}.weight": (inner, width) for n in ("query", "key", "value")}
        layer["attention.output.weight"] = (width, inner)
        layer |= {"mlp.wi_0.weight": (mlp, width), "mlp.wi_1.weight": (mlp, width)}
        layer |= {"mlp.wo.weight": (width, mlp)}
        layer |= {f"pre_{n}_layer_norm.weight": (width,) for n in ("attention", "mlp")}
        keys |= _below(f"encoder.layer.{i}.", layer)
    return keys, width
