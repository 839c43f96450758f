"""Folders as an official Eagle release is published, with random weights, at any size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eagle_moe.interop.importer import plan_import, run_import
from tests.official_layout import TINY, TINY_GEOMETRY, X5, Sizes, layout


def random_tensors(keys: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * (0.5 / max(shape[-1], 1) ** 0.5)
        for key, shape in keys.items()
    }


def release_config(sizes: Sizes, towers: str, **changes: Any) -> dict[str, Any]:
    """config.json as the official trainer leaves it, with fields that nobody needs."""
    channels = layout(sizes, towers)["model.mm_projector.0.weight"][1]
    return {
        "architectures": ["EagleLlamaForCausalLM"],
        "model_type": "eagle_llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "max_position_embeddings": 4096,
        "mm_hidden_size": channels,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": towers,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "transformers_version": "4.44.2",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": sizes.vocabulary,
        **sizes.config,
        **changes,
    }


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, form: str = "safetensors"
) -> None:
    """Write `tensors` as `form` (`safetensors` or `bin`), in one file or with an index."""
    stem, ending = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = [f"{stem}.{ending}"]
    if shards > 1:
        names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}" for i in range(shards)]
    weight_map = {}
    for name, keys in zip(names, _split(list(tensors), shards), strict=True):
        held = {key: tensors[key].contiguous() for key in keys}
        if form == "safetensors":
            save_file(held, folder / name)
        else:
            torch.save(held, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def _split(keys: list[str], parts: int) -> Iterator[list[str]]:
    size = -(-len(keys) // parts)
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def write_release(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    sizes: Sizes = TINY,
    towers: str = X5,
    shards: int = 1,
    form: str = "safetensors",
    **changes: Any,
) -> dict[str, Tensor]:
    """A release with random weights and a row for each token; returns its tensors.

    `changes`: of config.json.
    """
    sizes = replace(sizes, vocabulary=len(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(release_config(sizes, towers, **changes)))
    tensors = random_tensors(layout(sizes, towers))
    write_weights(folder, tensors, shards, form)
    tokenizer.save_pretrained(folder)
    return tensors


def official_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Bytes, BOS in front, `special` tokens, no `<image>`: as a release has it."""
    names = ["<unk>", "<s>", "</s>", *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*names, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def write_world(folder: Path) -> Path:
    """Fill `folder` with `release` (X5, three safetensors shards) and its `geometry.yaml`."""
    write_release(folder / "release", official_tokenizer(), shards=3)
    (folder / "geometry.yaml").write_text(yaml.safe_dump(TINY_GEOMETRY))
    return folder


def do_import(source: Path, target: Path, geometry: Path | dict = TINY_GEOMETRY, **options) -> dict:
    """Import with a geometry; returns the tensors that were written."""
    if isinstance(geometry, dict):
        path = source.parent / "geometry-given.yaml"
        path.write_text(yaml.safe_dump(geometry))
        geometry = path
    run_import(plan_import(source, geometry), target, **options)
    return {k: v for file in target.glob("*.safetensors") for k, v in load_file(file).items()}
