"""Tokenizer folders in the layout of an official release, and those of the golden texts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from eagle_moe.interop.tokenizer import load_release_tokenizer
from tests.eagle_release import GOLDENS

LLAMA3_SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def write_sentencepiece(
    folder: Path, model: Path, added: dict[str, int] | None = None, **settings: Any
) -> Path:
    """As the slow `LlamaTokenizer` of transformers 4.44 saves itself."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, folder / "tokenizer.model")
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, **(added or {})}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "added_tokens_decoder": {
            str(number): {"content": content, **flags, "special": True}
            for content, number in tokens.items()
        },
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": "<unk>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def write_llama3(folder: Path, tokenizer: Path, **settings: Any) -> Path:
    """As Llama-3's fast tokenizer saves itself."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    config = {
        **LLAMA3_SPECIAL,
        "clean_up_tokenization_spaces": True,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def golden_tokenizer(described: str, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the `tokenizer` field of a golden text describes."""
    return load_release_tokenizer(write_golden_tokenizer(described, folder))


def write_golden_tokenizer(described: str, folder: Path) -> Path:
    if described.startswith("tiny_llama3"):
        return write_llama3(folder, GOLDENS / "tiny_llama3_tokenizer.json")
    model = GOLDENS / "tiny_sp.model"
    flags = dict(re.findall(r"(legacy|add_bos)=(True|False)", described))
    settings = {
        "legacy": flags["legacy"] == "True",
        "add_bos_token": flags.get("add_bos", "True") == "True",
    }
    added = {}
    if "chatml" in described:
        size = pieces(model)
        added = {"<|im_start|>": size, "<|im_end|>": size + 1}
    return write_sentencepiece(folder, model, added, **settings)


def pieces(model: Path) -> int:
    """Number of pieces of a sentencepiece model."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(model)).get_piece_size()
