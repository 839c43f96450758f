"""What an official Eagle release (NVlabs/EAGLE) is: its config.json, its towers, its keys.

A release has been fine-tuned as one model, so it always runs under the profile `release`; only its
sizes may differ, and then a geometry says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict
from torch import Tensor
from transformers import LlamaConfig

from eagle_moe.build import ModelSpec, grow_rows
from eagle_moe.config import EagleMixConfig
from eagle_moe.experts import expert_class
from eagle_moe.interop.keymap import Rule, below, ignored
from eagle_moe.interop.rules import EAGLE, projector
from eagle_moe.parts import PROJECTOR, expert_prefix
from eagle_moe.profile import Profile, read_profile
from eagle_moe.schema import Schema, nearest

TOWERS = {
    "clip-448": "clip",
    "convnext-1024": "convnext",
    "sam-1024": "sam",
    "det-1024": "eva02",
    "pix2struct-1024": "pix2struct",
}
"""Name of a tower in `mm_vision_tower` -> our preset, which is also the expert's name."""

PROFILE = "release"
_MODEL_TYPE = "eagle_llama"
_LLAMA_FIELDS = frozenset(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
_NOT_OF_THE_LLM = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})


class ReleaseConfig(Schema):
    """The fields of a release's config.json that say something about more than the LLM."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    mm_vision_tower: str
    mm_projector_type: str = "mlp2x_gelu"
    mm_patch_merge_type: str = "flat"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    mm_hidden_size: int | None = None
    image_aspect_ratio: str | None = None
    tokenizer_model_max_length: int | None = None

    @property
    def towers(self) -> list[str]:
        """Our presets in the order of the release's tower string, which is the mixture's order."""
        return [TOWERS[name] for name in self.mm_vision_tower.split(";")]


def read_release(folder: Path) -> tuple[ReleaseConfig, dict[str, Any]]:
    """A release's config, and the fields of its language model's (`LlamaConfig`).

    Raises `ValueError` that names the folder and the field if it is no release that exists.
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "no config.json in it" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder}: is not an official Eagle release: {what}.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}). Copy it again.") from None
    if not isinstance(fields, dict) or fields.get("model_type") != _MODEL_TYPE:
        found = fields.get("model_type") if isinstance(fields, dict) else None
        raise ValueError(
            f"{path}: is not an official Eagle release: model_type is {found!r}, not "
            f"{_MODEL_TYPE!r}. A model of eagle_moe needs no import; for a plain language model or "
            "an expert, name its folder in a recipe's `init`."
        )
    config = ReleaseConfig.parse(fields, str(path))
    _check(config, path)
    llm = {key: fields[key] for key in sorted(_LLAMA_FIELDS - _NOT_OF_THE_LLM) if key in fields}
    return config, {**llm, "model_type": "llama"}


def _check(config: ReleaseConfig, path: Path) -> None:
    for name in config.mm_vision_tower.split(";"):
        if name not in TOWERS:
            raise ValueError(f'{path}: mm_vision_tower: no tower "{name}".{nearest(name, TOWERS)}')
    _connector(config.mm_projector_type, path)
    for field, value, only in (
        ("mm_patch_merge_type", config.mm_patch_merge_type, "flat"),
        ("mm_use_im_start_end", config.mm_use_im_start_end, False),
        ("mm_use_im_patch_token", config.mm_use_im_patch_token, False),
    ):
        if value != only:
            raise ValueError(
                f"{path}: {field} is {value!r}; no Eagle release has that, only {only!r}."
            )
    if config.image_aspect_ratio == "anyres":
        raise ValueError(f"{path}: image_aspect_ratio is 'anyres', which no mixture of Eagle runs.")


def _connector(kind: str, path: Path) -> dict[str, Any]:
    if kind == "linear":
        return {"kind": "linear"}
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        return {"kind": "mlp", "depth": int(match[1])}
    raise ValueError(f"{path}: mm_projector_type is {kind!r}; known are linear and mlp<N>x_gelu.")


def release_spec(
    config: ReleaseConfig, llm: dict[str, Any], folder: Path, geometry: Profile, template: str
) -> ModelSpec:
    """The release as a model file would describe it. `geometry`: sizes that are not the presets'.

    Raises `ValueError` if the geometry does not fit.
    """
    if unknown := sorted(set(geometry.experts) - set(config.towers)):
        raise ValueError(
            f"geometry: experts.{unknown[0]}: the release has no such tower."
            f"{nearest(unknown[0], config.towers)}"
        )
    fit = "pad" if config.image_aspect_ratio == "pad" else "crop"
    model = {
        "canvas": {"fit": fit},
        "experts": config.towers,
        "connector": _connector(config.mm_projector_type, folder / "config.json"),
        "language_model": {"config": llm, "tokenizer": str(folder)},
        "template": template,
    }
    filled = read_profile(PROFILE).fill(geometry.fill(model))
    return ModelSpec.parse(filled, "geometry")


def release_rules(config: EagleMixConfig, llm_vocabulary: int) -> list[Rule]:
    """Official key -> ours, for a release that `config` describes.

    `llm_vocabulary`: rows of the release's embeddings; ours may have more, for `<image>`.
    """
    grow = _grower(llm_vocabulary, config.text_config.vocab_size)
    rules = [
        Rule(r"model\.embed_tokens\.weight", "model.language_model.embed_tokens.weight", grow),
        Rule(r"lm_head\.weight", "lm_head.weight", grow),
        ignored(r".*rotary_emb\.inv_freq", "a table that is computed, not learned"),
        Rule(r"model\.((?:layers|norm)\..+)", r"model.language_model.\1"),
        *below(projector(), "model.mm_projector.", PROJECTOR),
    ]
    for index, spec in enumerate(config.vision_config.expert_specs):
        arch = expert_class(spec.kind).Arch.parse(spec.arch, f"expert `{spec.name}`: arch")
        tower = f"model.vision_tower.vision_towers.{index}.vision_tower."
        rules += below(EAGLE[spec.kind](arch), tower, expert_prefix(spec.name))
    return rules


def _grower(rows: int, wanted: int) -> Callable[[Tensor], Tensor] | None:
    return partial(grow_rows, rows=wanted) if wanted > rows else None
