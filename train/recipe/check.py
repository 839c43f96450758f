"""What must hold between the fields of a recipe, told before anything is built or downloaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from eagle_moe.config import EagleMixConfig
from eagle_moe.parts import CONNECTOR, EXPERTS, LANGUAGE_MODEL, resolve_parts
from eagle_moe.processor import read_template
from eagle_moe.schema import nearest
from train.engines import check_engine
from train.recipe.schema import Recipe, Stage

SET_BY_THE_RUN = {
    "output_dir": "`output_dir` of the recipe",
    "seed": "`seed` of the recipe",
    "data_seed": "`seed` of the recipe",
    "eval_strategy": "`eval` of the stage",
    "eval_steps": "`eval.every` of the stage",
    "per_device_eval_batch_size": "`eval.batch_size` of the stage",
    "remove_unused_columns": "the trainer: batches with images need all their columns",
    "activation_checkpointing": "`checkpointing` of the stage",
    "activation_checkpointing_kwargs": "`checkpointing` of the stage",
    "gradient_checkpointing": "`checkpointing` of the stage",
    "gradient_checkpointing_kwargs": "`checkpointing` of the stage",
    "deepspeed": "`engine` of the stage",
    "fsdp": "`engine` of the stage",
    "fsdp_config": "`engine` of the stage",
    "logging_nan_inf_filter": "the trainer: a loss that is not finite stops the run",
    "resume_from_checkpoint": "the run: it continues by itself",
    "train_sampling_strategy": "`length_aware` and `packing` of the stage",
    "restore_callback_states_from_checkpoint": "the run: it continues by itself",
    "ignore_data_skip": "the run: it continues with the samples that it has not seen",
    "save_only_model": "the run: a resume point holds all that it takes to continue",
    "enable_jit_checkpoint": "the run: it saves when it is asked to stop",
}
"""Training arguments that a stage cannot give, and what decides them."""


def check_recipe(recipe: Recipe, source: str) -> None:
    """Raises `ValueError` that names `source`, the field and what to do instead."""
    _check_model(recipe, source)
    experts = recipe.experts
    for name in recipe.init.experts:
        _known(name, experts, f"{source}: init.experts")
    earlier: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        where = f"{source}: stages.{name}"
        _check_parts(stage, experts, where)
        _check_sources(stage, earlier, experts, where)
        _check_arguments(stage, where)
        _check_engine(recipe, stage, where)
        frozen = stage.frozen_dtype or recipe.frozen_dtype
        if frozen not in (None, stage.dtype or recipe.dtype) and not stage.args.get("bf16"):
            raise ValueError(f"{where}: frozen_dtype differs from dtype: this needs args.bf16.")
        for data in stage.all_data:
            _known(data, recipe.data, f"{where}: data")
        earlier[name] = stage


def _check_model(recipe: Recipe, source: str) -> None:
    """Experts, fusion, connector and chat templates; the LLM's config may need a download."""
    spec = recipe.model
    vision = {"experts": spec.experts, "fusion": spec.fusion}
    try:
        EagleMixConfig(vision_config=vision, connector=spec.connector)
        for template in {spec.template, *(stage.template for stage in recipe.stages.values())}:
            if template is not None:
                read_template(template)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _known(name: str, names: Collection[str], where: str) -> None:
    if name not in names:
        raise ValueError(f"{where}: no `{name}`.{nearest(name, names)}")


def _check_parts(stage: Stage, experts: Sequence[str], where: str) -> None:
    full = resolve_parts(stage.trainable, experts, f"{where}: trainable")
    adapted = resolve_parts(stage.lora, experts, f"{where}: lora")
    if both := set(full) & set(adapted):
        raise ValueError(f"{where}: {sorted(both)} cannot be both in `trainable` and in `lora`.")
    for name, lora in stage.lora.items():
        if lora.quantize and name != LANGUAGE_MODEL:
            raise ValueError(
                f"{where}: lora.{name}: quantize is for `{LANGUAGE_MODEL}` alone. Leave it out."
            )
    if not full and not adapted:
        raise ValueError(f"{where}: nothing learns. Name parts in `trainable` or `lora`.")
    for field in ("lr", "weight_decay", "layer_decay"):
        named = resolve_parts(getattr(stage, field), experts, f"{where}: {field}")
        if idle := set(named) - set(full) - set(adapted):
            raise ValueError(f"{where}: {field}: {sorted(idle)} would get one, but do not learn.")
    for field in ("layer_decay", "checkpointing"):
        if CONNECTOR in resolve_parts(getattr(stage, field), experts, f"{where}: {field}"):
            raise ValueError(f"{where}: {field}: {CONNECTOR} has no repeated blocks. Leave it out.")
    if stage.cache_features and any(part.startswith(f"{EXPERTS}.") for part in (*full, *adapted)):
        raise ValueError(f"{where}: cache_features needs frozen experts, but some of them learn.")
    if stage.per_expert and "language_model" in (*full, *adapted):
        raise ValueError(
            f"{where}: a `per_expert` stage cannot train `language_model`: "
            "there would be one for each expert, and no way to choose."
        )


def _check_sources(
    stage: Stage, earlier: Mapping[str, Stage], experts: Sequence[str], where: str
) -> None:
    if stage.init_from is None and earlier:
        raise ValueError(
            f"{where}: say where its weights come from: `init_from: [{list(earlier)[-1]}]`, "
            "or `init_from: []` to start from `init` again."
        )
    for source in stage.sources:
        resolve_parts(source.parts or (), experts, f"{where}: init_from.parts")
        # A stage's name has no slash; with one, it is a folder, which is looked for at the start.
        if "/" not in source.checkpoint and not Path(source.checkpoint).exists():
            _known(source.checkpoint, earlier, f"{where}: init_from: no earlier stage or folder")


def _check_engine(recipe: Recipe, stage: Stage, where: str) -> None:
    try:
        check_engine(stage.engine or recipe.engine)
    except ValueError as error:
        raise ValueError(f"{where}: engine: {error}") from None


def _check_arguments(stage: Stage, where: str) -> None:
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in stage.args:
        if name in SET_BY_THE_RUN:
            raise ValueError(f"{where}: args.{name} is set by {SET_BY_THE_RUN[name]}.")
        _known(name, names - set(SET_BY_THE_RUN), f"{where}: args")
    if stage.packing and stage.length_aware:
        raise ValueError(f"{where}: packing brings rows of like work together: drop length_aware.")
    if stage.args.get("label_smoothing_factor"):
        raise ValueError(
            f"{where}: args.label_smoothing_factor: transformers would smooth labels that are not "
            "shifted by one, because it does not know this model. Leave it out."
        )
    if stage.batch_size and "gradient_accumulation_steps" in stage.args:
        raise ValueError(
            f"{where}: give `batch_size` (samples per step) or args.gradient_accumulation_steps, "
            "not both."
        )
