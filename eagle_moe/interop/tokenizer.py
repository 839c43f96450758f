"""The tokenizer of an official release, as one fast tokenizer that gives the release's ids.

The release cuts a prompt at `<image>` and tokenises each piece on its own, with Llama's slow
tokenizer. So every piece begins as a text does, with sentencepiece's dummy prefix (a space, `▁`),
and that space is a token of its own before a line break. A slow tokenizer with `legacy: true`
begins anew after its special tokens too; with `legacy: false` it does not. Both are rules of the
tokenizer, so they are written into the tokenizer (`_write_prefixes`) and not into chat templates:
prompts in a batch, prompts that no template wrote, training and serving engines all get the same
ids, from the saved `tokenizer.json` alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eagle_moe.processor import IMAGE_TOKEN

SENTENCEPIECE, FAST, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPACE = "▁"
BPE = 2
"""`trainer_spec.model_type` of a sentencepiece model made by byte-pair encoding."""

TEMPLATES = {"<|start_header_id|>": "llama3-release", "<|im_start|>": "yi"}
"""A token that only tokenizers of one family have -> the family's chat template."""


def load_release_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, with `<image>` as one special token after all its own.

    Reads `tokenizer.model` (Vicuna, Yi) or `tokenizer.json` (Llama-3), with what stands beside it
    in `tokenizer_config.json`, `added_tokens.json`, `special_tokens_map.json`. The padding token is
    the folder's own, else the unknown token, else a new `<pad>`, as official training has it. What
    comes back keeps the folder's `legacy` among its `init_kwargs`.

    Nothing is downloaded and no code of the folder is run. Raises `ValueError` for a folder without
    a tokenizer, a damaged file, or settings that would give other ids than the release's.
    """
    folder = Path(folder)
    if (folder / SENTENCEPIECE).is_file():
        return _from_sentencepiece(folder)
    if (folder / FAST).is_file():
        loaded = _loaded(PreTrainedTokenizerFast, folder)
        state = json.loads(loaded.backend_tokenizer.to_str())
        if SPACE in json.dumps([state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False):
            raise ValueError(
                f"{folder / FAST}: was converted from a {SENTENCEPIECE}, which official releases "
                "of this family come with and which says where spaces belong. Put it beside."
            )
        return _finished(loaded, state)
    raise ValueError(f"{folder}: has no tokenizer (neither {SENTENCEPIECE} nor {FAST}).")


def release_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the chat template that the official release uses with a tokenizer of this family."""
    vocabulary = tokenizer.get_vocab()
    return next((name for token, name in TEMPLATES.items() if token in vocabulary), "vicuna")


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """As transformers 4.44's slow `LlamaTokenizer` reads `folder`; its defaults, too."""
    settings = _settings(folder)
    legacy = settings.get("legacy")
    legacy = True if legacy is None else bool(legacy)
    model_prefix = _check_sentencepiece(folder / SENTENCEPIECE)
    # With `legacy: false` it is the tokenizer that writes the prefix, whatever the model says.
    prefix = model_prefix if legacy else bool(settings.get("add_prefix_space", True))
    loaded = _loaded(LlamaTokenizer, folder)
    state = json.loads(loaded.backend_tokenizer.to_str())
    _check_added_tokens(state["added_tokens"], folder, settings)
    _write_prefixes(state, prefix, legacy, folder)
    return _finished(
        loaded,
        state,
        legacy=legacy,
        add_bos_token=bool(settings.get("add_bos_token", True)),
        add_eos_token=bool(settings.get("add_eos_token", False)),
    )


def _loaded(cls: type[PreTrainedTokenizerBase], folder: Path) -> PreTrainedTokenizerBase:
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the backend raises nothing more specific
        raise ValueError(f"{folder}: its tokenizer cannot be read: {error}") from None


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON: {error}") from None
    name = settings.get("tokenizer_class", "LlamaTokenizer")
    if name not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        raise ValueError(
            f"{file}: tokenizer_class = {name}: an official release with a {SENTENCEPIECE} has "
            "LlamaTokenizer."
        )
    return settings


def _check_sentencepiece(file: Path) -> bool:
    """Whether the model in `file` writes a dummy prefix; refuses what Llama's models do not do."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2  # without type information
    model = generated.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(
            f"{file}: is not a sentencepiece model ({error}). Fetch it again; a clone without Git "
            "LFS holds a short text file in its place."
        ) from None
    rules = model.normalizer_spec
    if not model.pieces:
        raise ValueError(f"{file}: is a sentencepiece model without a single piece.")
    if model.trainer_spec.model_type != BPE or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(f"{file}: is not a byte-pair model like Llama's.")
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise ValueError(f"{file}: changes the text before it is tokenised (rule {rules.name}).")
    return rules.add_dummy_prefix


def _check_added_tokens(added: list[dict[str, Any]], folder: Path, settings: dict) -> None:
    """Raises `ValueError` if a token did not get the id that the folder gives it."""
    wanted = {
        entry["content"]: int(number)
        for number, entry in settings.get("added_tokens_decoder", {}).items()
    }
    extra = folder / "added_tokens.json"
    if extra.is_file():
        wanted |= json.loads(extra.read_text(encoding="utf-8"))
    given = {token["content"]: token["id"] for token in added}
    for content, number in wanted.items():
        if given.get(content) != number:
            raise ValueError(
                f"{folder}: {content} should be token {number}, but would be "
                f"{given.get(content)}: the added tokens have gaps or do not fit the vocabulary."
            )


def _write_prefixes(state: dict[str, Any], prefix: bool, legacy: bool, folder: Path) -> None:
    """Let `state`, a backend's JSON, write the dummy prefix where the release does.

    A token that is not `normalized` cuts the text before the normaliser sees it, so each piece
    gets a prefix. `<image>` is such a token, and with `legacy` all others are. Without, they are
    found afterwards, in text that has its prefix; a special one at the very start of a piece loses
    it again. (Others lose it where they are the whole piece, as an added token is itself spelled
    by the normaliser.)
    """
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    before = []
    for token in state["added_tokens"]:
        token["normalized"] = prefix and not legacy and token["content"] != IMAGE_TOKEN
        if token["normalized"]:
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise ValueError(
                    f"{folder}: {token['content']} takes in the spaces around it, which cannot be "
                    "combined with `legacy: false`."
                )
            content = re.escape(token["content"].replace(" ", SPACE))
            before.append(content if token["special"] else content + r"\z")
    if before:
        pattern = {"Regex": rf"\A{SPACE}(?={'|'.join(before)})"}
        steps.append({"type": "Replace", "pattern": pattern, "content": ""})
    state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    state["pre_tokenizer"] = None


def _finished(
    loaded: PreTrainedTokenizerBase, state: dict[str, Any], **options: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer on the backend `state`, with a padding token and `<image>`, in this order."""
    backend = Tokenizer.from_str(json.dumps(state))
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: str(token) for name in names if (token := getattr(loaded, name)) is not None}
    special.setdefault("pad_token", special.get("unk_token", "<pad>"))
    for token in (special["pad_token"], IMAGE_TOKEN):
        if backend.token_to_id(token) is None:  # else its flags would be lost
            backend.add_special_tokens([token])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=loaded.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=loaded.clean_up_tokenization_spaces,
        **options,
    )
