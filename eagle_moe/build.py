"""From a model file (`configs/models/*.yaml`) to config, tokenizer, processor and model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig

from eagle_moe.canvas import CLIP_MEAN_COLOUR, Fit
from eagle_moe.config import EagleMixConfig
from eagle_moe.image_processor import EagleMixImageProcessor
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import IMAGE_TOKEN, EagleMixProcessor, read_template
from eagle_moe.profile import read_profile
from eagle_moe.quantization import quantization_config
from eagle_moe.schema import Schema, load_yaml, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY_MULTIPLE = 64
"""A vocabulary that must grow for `<image>` grows to a multiple of this, for fast matmuls."""


class CanvasSpec(Schema):
    """The square image that all experts look at; see `eagle_moe.canvas.to_canvas`."""

    size: int = Field(1024, gt=0)
    fit: Fit = "pad"
    fill: tuple[int, int, int] = CLIP_MEAN_COLOUR


class LanguageModelSpec(Schema):
    """The causal language model that reads the image tokens."""

    checkpoint: str | None = None
    """Hub id or folder of its weights; a recipe may give them instead."""
    config: dict[str, Any] | None = None
    """Its config's fields with `model_type`; default: read from `checkpoint`."""
    tokenizer: str | None = None
    """Hub id or folder; default: `checkpoint`."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.checkpoint is None and (self.config is None or self.tokenizer is None):
            raise ValueError("give `checkpoint`, or both `config` and `tokenizer`")
        return self


class ModelSpec(Schema):
    """A whole model as a model file describes it."""

    profile: str | None = None
    """`release`, `native` or a YAML file: what fills the fields below where they are silent."""
    canvas: CanvasSpec = CanvasSpec()
    experts: list[str | dict[str, Any]] = Field(min_length=1)
    """Entries of `eagle_moe.experts.resolve_expert`, in mixture order."""
    fusion: dict[str, Any] = {"kind": "channel_concat"}
    connector: dict[str, Any] = {"kind": "mlp"}
    language_model: LanguageModelSpec
    template: str = "vicuna"
    """`vicuna`, `llama3`, `plain`, `short`, ... (`eagle_moe/templates`), or a Jinja file."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        name = data.get("profile") if isinstance(data, dict) else None
        return read_profile(name).fill(data) if isinstance(name, str) else data


def load_model_spec(path: str | Path, overrides: Sequence[str] = ()) -> ModelSpec:
    """Read a model file and apply `key.sub=value` overrides."""
    return ModelSpec.parse(load_yaml(path, overrides), str(path))


def build_config(spec: ModelSpec, image_token_id: int) -> EagleMixConfig:
    """The config that `spec` describes, for a tokenizer whose `<image>` is `image_token_id`.

    If that id lies beyond the language model's vocabulary, the vocabulary grows (to a multiple of
    `VOCABULARY_MULTIPLE`): weights from `spec.language_model.checkpoint` need
    `resize_token_embeddings(config.text_config.vocab_size)` before they fit.
    """
    text_config = _text_config(spec.language_model)
    if image_token_id >= text_config.vocab_size:
        blocks = image_token_id // VOCABULARY_MULTIPLE + 1
        text_config.vocab_size = blocks * VOCABULARY_MULTIPLE
    return EagleMixConfig(
        vision_config={
            "canvas_size": spec.canvas.size,
            "experts": spec.experts,
            "fusion": spec.fusion,
        },
        text_config=text_config,
        connector=spec.connector,
        image_token_id=image_token_id,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def _text_config(spec: LanguageModelSpec) -> PreTrainedConfig:
    if spec.config is None:
        try:
            return AutoConfig.from_pretrained(spec.checkpoint)
        except OSError as error:
            raise ValueError(
                f"language_model.checkpoint: {spec.checkpoint}: {error} "
                "Give its config under `language_model.config` to build without it."
            ) from None
    fields = dict(spec.config)
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f'language_model.config.model_type: "{kind}".{nearest(str(kind), CONFIG_MAPPING)}'
        )
    return CONFIG_MAPPING[kind](**fields)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with `<image>` as one special token."""
    name = spec.language_model.tokenizer or spec.language_model.checkpoint
    try:
        return AutoTokenizer.from_pretrained(
            name, extra_special_tokens={"image_token": IMAGE_TOKEN}
        )
    except OSError as error:
        raise ValueError(f"language_model.tokenizer: {name}: {error}") from None


def build_processor(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> EagleMixProcessor:
    """Image processor, tokenizer and chat template of the model that `spec` describes.

    A tokenizer without a padding token gets its unknown or end token for that (masked everywhere).
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    config = build_config(spec, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    size = {"height": spec.canvas.size, "width": spec.canvas.size}
    return EagleMixProcessor(
        EagleMixImageProcessor(size=size, fit=spec.canvas.fit, fill=list(spec.canvas.fill)),
        tokenizer,
        image_seq_length=config.num_image_tokens,
        chat_template=read_template(spec.template),
    )


def grow_rows(table: Tensor, rows: int) -> Tensor:
    """Embeddings (n, D) -> (rows, D) for added tokens; theirs are the mean of all, as in LLaVA."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def build_model(config: EagleMixConfig, **options: Any) -> EagleMixForConditionalGeneration:
    """The model with random weights, on the current default device (meta included).

    `options`: `dtype`, `attn_implementation` as `from_pretrained` takes them.
    """
    return EagleMixForConditionalGeneration._from_config(config, **options)


def load_model(
    folder: str | Path, quantize: str | None = None, **options: Any
) -> EagleMixForConditionalGeneration:
    """Load a saved model, every tensor of it and nothing else.

    `quantize`: `int8` or `nf4`, the language model in 8 or 4 bits (`eagle_moe.quantization`).
    `options` go to `from_pretrained`. Raises `ValueError` if `folder` is no eagle_moe model, or
    names the tensors that are missing, unexpected, or of another shape.
    """
    if Path(folder).exists() and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: is not a model folder (no config.json in it).")
    if quantize is not None:
        dtype = options.get("dtype", "auto")
        options["quantization_config"] = quantization_config(quantize, _dtype(folder, dtype))
    try:
        model, report = EagleMixForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except OSError as error:
        raise ValueError(f"{folder}: cannot be loaded: {error}") from None
    problems = [
        f"{title}: {', '.join(map(str, sorted(report[key])))}"
        for key, title in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "not part of this model"),
            ("mismatched_keys", "of another shape (name, saved, expected)"),
        )
        if report[key]
    ]
    if problems:
        raise ValueError(
            f"{folder}: the weights do not fit the config; nothing was loaded.\n"
            + "\n".join(problems)
        )
    return model


def _dtype(folder: str | Path, dtype: str | torch.dtype) -> torch.dtype:
    """What `from_pretrained` takes `dtype` for: "auto" is that of the weights."""
    if dtype == "auto":
        return EagleMixConfig.from_pretrained(folder).dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
