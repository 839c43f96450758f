"""Any recipe, small: the same stages with toy sizes, on a CPU, in a minute or two.

    python -m train.run configs/recipes/eagle-x5-vicuna-7b.yaml --shrink

Sizes shrink: experts to the tiny presets of their kinds, the language model to a random one of its
family, grids, batches, steps, data (made on the spot, as is the tokenizer). All else stays as the
recipe has it: parts, rates, schedules, `init_from`, templates, precision, adapters, the profile's
views and switches. So a shrunken run shows that a recipe goes through, and nothing about scores.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from eagle_moe.build import LanguageModelSpec
from eagle_moe.experts import ExpertSpec, resolve_expert
from eagle_moe.experts.registry import presets
from eagle_moe.fusion import FUSIONS
from eagle_moe.processor import read_template
from train.engines import AUTO
from train.recipe import Recipe, Stage, parse_recipe
from train.toys import Toys

CANVAS = 64
"""Pixels; the tiny presets are made for it."""
GRID = 2
STEPS = 2
"""One at a rate of zero, where a schedule warms up, and one that moves weights."""
BATCH = 4
MICRO_BATCH = 2
"""Of two samples, so that gradients are accumulated as at full size."""
MAX_LENGTH = 768
"""Tokens: a system sentence in single characters, and two pictures."""

STAND_INS = {"timm:": "timm:test_vit.r160_in1k"}
"""Backends that serve models by name, and the small one of them that stands in for any other."""
NO_SIZES = frozenset({"unshuffle"})
"""Whole numbers in experts' `arch` that say how, not how much."""

LANGUAGE_MODEL_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2 * MAX_LENGTH,
}
FOLLOWS_FROM_SIZES = ("head_dim", "layer_types", "torch_dtype", "dtype", "transformers_version")

STAGE_SIZES = frozenset(
    {"batch_size", "max_length", "eval", "tasks", "args", "init_from", "engine"}
)
"""Fields of a stage that change, `args` and `eval` in part; `init_from` loses foreign folders, and
`tasks` are left out, as their questions are not made smaller."""
ARGUMENT_SIZES: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": MICRO_BATCH,
    "logging_steps": 1,
    "save_steps": STEPS,
    "dataloader_num_workers": 0,
    "report_to": "none",
}


def shrink(recipe: Recipe) -> Recipe:
    """The shrunken recipe; what it starts from and learns from is written to its `output_dir`.

    That is the recipe's own with `-shrunken` behind it. Several processes may call this at once.
    Raises `ValueError` for a kind of expert that has no tiny preset.
    """
    toys = Toys(Path(f"{recipe.output_dir}-shrunken", "inputs"), recipe.seed)
    experts = [shrink_expert(resolve_expert(entry)) for entry in recipe.model.experts]
    words = {word for name in _templates(recipe) for word in _special_words(name)}
    llm = toys.language_model(_text_config(recipe.model.language_model), sorted(words))
    inputs = {
        "init": {
            "language_model": str(llm),
            "experts": {spec.name: str(toys.expert(spec)) for spec in experts},
        },
        "data": {name: str(toys.data(name, _is_captions(recipe, name))) for name in recipe.data},
    }
    return parse_recipe(_shrunken(recipe, experts, llm, inputs), f"{recipe.name}, shrunken")


def _shrunken(
    recipe: Recipe, experts: list[ExpertSpec], llm: Path, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    told = recipe.dump()
    fusion = {**recipe.model.fusion}
    if "grid" in FUSIONS[fusion["kind"]].Options.model_fields:
        fusion["grid"] = GRID
    config = json.loads((llm / "config.json").read_text(encoding="utf-8"))
    model = {
        **told["model"],
        "canvas": {**told["model"]["canvas"], "size": CANVAS},
        "experts": [spec.dump() for spec in experts],
        "fusion": fusion,
        "language_model": {"checkpoint": str(llm), "config": config},
    }
    data = {
        name: {
            **entry,
            "path": inputs["data"][name],
            "image_root": None,
            "limit": None,
            "manifest": None,
            "on_bad_image": "fail",
        }
        for name, entry in told["data"].items()
    }
    return {
        **told,
        "name": f"{recipe.name}-shrunken",
        "output_dir": f"{recipe.output_dir}-shrunken",
        "model": model,
        "init": inputs["init"],
        "attn_implementation": recipe.attn_implementation.replace("flash_attention_2", "sdpa"),
        "engine": recipe.engine if _is_launched() else AUTO,
        "features_dir": None,
        "data": data,
        "stages": {
            name: _stage(recipe, stage, told["stages"][name])
            for name, stage in recipe.stages.items()
        },
    }


def _stage(recipe: Recipe, stage: Stage, told: Mapping[str, Any]) -> dict[str, Any]:
    args = {k: v for k, v in stage.args.items() if k != "num_train_epochs"} | ARGUMENT_SIZES
    if "lr_scheduler_kwargs" in args:  # of a schedule that ends with a decay of so many steps
        args["lr_scheduler_kwargs"] = {
            key: 1 if key.startswith("num_") else value
            for key, value in args["lr_scheduler_kwargs"].items()
        }
    if args.get("warmup_steps", 0) >= 1:
        args["warmup_steps"] = 1
    small: dict[str, Any] = {"args": args, "max_length": min(stage.max_length, MAX_LENGTH)}
    if stage.batch_size:
        small["batch_size"] = BATCH
    if stage.eval:
        small["eval"] = {**told["eval"], "every": STEPS, "batch_size": MICRO_BATCH}
    small["tasks"] = None
    if told["init_from"] is not None:  # other runs' checkpoints do not fit; `init` lies below
        small["init_from"] = [
            entry
            for entry, source in zip(told["init_from"], stage.sources, strict=True)
            if source.checkpoint in recipe.stages
        ]
    if not _is_launched():
        small["engine"] = None
    return {**told, **small}


def _is_launched() -> bool:
    """Whether torchrun or the like started this process: the engines stay, then."""
    return "WORLD_SIZE" in os.environ


def shrink_expert(spec: ExpertSpec) -> ExpertSpec:
    """An expert of the same kind and name in the sizes of its tiny preset.

    What the view does to pixels, and what in `arch` is no size, stays as `spec` has it.
    """
    family, colon, _ = spec.kind.partition(":")
    if colon and family + colon in STAND_INS:
        small = resolve_expert(STAND_INS[family + colon])
        return small.model_copy(update={"name": spec.name})
    if f"{spec.kind}-tiny" not in presets():
        raise ValueError(
            f"shrink: experts of kind {spec.kind} have no preset `{spec.kind}-tiny` to stand in "
            f"for `{spec.name}`. Register one, or give another expert in `model.experts`."
        )
    _, tiny = presets()[f"{spec.kind}-tiny"]
    sizes = {
        key: value
        for key, value in tiny.get("arch", {}).items()
        if _is_size(value) and key not in NO_SIZES
    }
    entry = {
        **spec.dump(),
        "view": {**spec.view.dump(), "size": tiny["view"]["size"]},
        "arch": {**spec.arch, **sizes},
        "card": tiny["card"],
    }
    return resolve_expert(entry)


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_size, value))
    return isinstance(value, int) and not isinstance(value, bool)


def _text_config(spec: LanguageModelSpec) -> dict[str, Any]:
    """The config of a tiny language model of the same family, less what its tokenizer decides."""
    if spec.config is None:
        fields = AutoConfig.from_pretrained(spec.checkpoint).to_dict()
    else:
        fields = dict(spec.config)
    heads = LANGUAGE_MODEL_SIZES["num_attention_heads"]
    shared = fields.get("num_key_value_heads") not in (None, fields["num_attention_heads"])
    kept = {k: v for k, v in fields.items() if k not in FOLLOWS_FROM_SIZES}
    return {**kept, **LANGUAGE_MODEL_SIZES, "num_key_value_heads": heads // 2 if shared else heads}


def _templates(recipe: Recipe) -> set[str]:
    named = {stage.template for stage in recipe.stages.values()}
    named |= {entry.template for entry in recipe.data.values()}
    return {name for name in named | {recipe.model.template} if name is not None}


def _is_captions(recipe: Recipe, name: str) -> bool:
    """Whether a data set is read as captions: by stages whose template writes no questions."""
    uses = [s.template for s in recipe.stages.values() if name in s.data]
    return bool(uses) and all(template == "plain" for template in uses)


def _special_words(template: str) -> set[str]:
    """Tokens such as <|eot_id|> that a chat template writes."""
    return set(re.findall(r"<\|\w+\|>", read_template(template)))
