"""The model that a run starts from, put together from the origins of its parts. Strict."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from eagle_moe.build import build_model, grow_rows
from eagle_moe.checkpoint import EXPERT_SPEC, EXPERT_WEIGHTS, read_parts, read_provenance
from eagle_moe.config import EagleMixConfig
from eagle_moe.experts import ExpertSpec
from eagle_moe.interop.projector import load_projector
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import (
    EXPERTS,
    LANGUAGE_MODEL,
    PROJECTOR,
    expert_part,
    expert_prefix,
    model_tensors,
    part_of,
)
from train.sources import Origin
from train.stages import StageRun

_MAY_DIFFER = frozenset(
    {
        # names, limits and how it is run, not what it computes; the vocabulary is checked by shape
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)


def load_model(
    run: StageRun, config: EagleMixConfig, origins: Mapping[str, Origin]
) -> EagleMixForConditionalGeneration:
    """Build the run's model with each part's weights from its origin; the rest is random.

    Raises `ValueError` that names tensors which are missing, left over or of another shape.
    """
    tensors = read_origins(origins, config)
    random = {part for part, origin in origins.items() if origin.kind == "random"}
    _check_tensors(tensors, config, random)
    return _materialise(tensors, config, run)


def read_origins(origins: Mapping[str, Origin], config: EagleMixConfig) -> dict[str, Tensor]:
    """The tensors of these parts as they are where they come from; none for random parts."""
    tensors: dict[str, Tensor] = {}
    for folder in {o.place for o in origins.values() if o.kind == "checkpoint"}:
        parts = [p for p, o in origins.items() if (o.kind, o.place) == ("checkpoint", folder)]
        tensors.update(read_parts(Path(folder), parts))
    for part, origin in origins.items():
        if origin.kind == "expert":
            tensors.update(_expert_tensors(part, Path(origin.place), config))
        elif origin.kind == "original":
            tensors.update(_in_place(part, origin.original().read()))
        elif origin.kind == "projector":
            tensors.update(_projector_tensors(Path(origin.place), config))
        elif origin.kind == "language_model":
            tensors.update(_language_model_tensors(origin.place, config))
    return tensors


def _materialise(
    tensors: dict[str, Tensor], config: EagleMixConfig, run: StageRun
) -> EagleMixForConditionalGeneration:
    recipe = run.recipe
    set_seed(recipe.seed)  # of the parts that start from random weights
    with quiet_transformers():  # what is random was checked, and is shown in the table
        return EagleMixForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=getattr(torch, run.dtype),
            attn_implementation=recipe.attn_implementation,
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no remarks from transformers while it loads or saves."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_tensors(tensors: Mapping[str, Tensor], config: EagleMixConfig, random: set[str]) -> None:
    with torch.device("meta"):
        expected = model_tensors(build_model(config))
    needed = {name for name in expected if part_of(name) not in random}
    faults = [f"missing: {name}" for name in sorted(needed - set(tensors))]
    faults += [f"left over: {name}" for name in sorted(set(tensors) - needed)]
    faults += [
        f"shape {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}: {name}"
        for name in sorted(needed & set(tensors))
        if tensors[name].shape != expected[name].shape
    ]
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(
            "The weights do not fit the model:\n" + "\n".join(faults[:20]) + more + "\n"
            "Give the model that they were made for, or take other weights in `init` or "
            "`init_from`."
        )


def _projector_tensors(place: Path, config: EagleMixConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        projector = build_model(config).model.multi_modal_projector
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    return {PROJECTOR + name: value for name, value in load_projector(place, shapes).items()}


def _expert_tensors(part: str, place: Path, config: EagleMixConfig) -> dict[str, Tensor]:
    path = place / EXPERT_WEIGHTS if place.is_dir() else place
    if not path.is_file():
        raise ValueError(f"init.{part}: {place} holds no {EXPERT_WEIGHTS}.")
    spec_path = path.parent / EXPERT_SPEC
    if spec_path.is_file():
        spec = ExpertSpec.parse(json.loads(spec_path.read_text(encoding="utf-8")), str(spec_path))
        wanted: tuple[ExpertSpec, ...] = config.vision_config.expert_specs
        _check_expert(part, spec, next(s for s in wanted if expert_part(s.name) == part))
    return _in_place(part, load_file(path))


def _in_place(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An expert's tensors under the names that they have in our model."""
    prefix = expert_prefix(part.removeprefix(f"{EXPERTS}."))
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def _check_expert(part: str, made: ExpertSpec, wanted: ExpertSpec) -> None:
    """Weights mean nothing under another architecture or normalisation, even if the shapes fit."""
    for field in ("kind", "arch", "view"):
        is_, should = getattr(made, field), getattr(wanted, field)
        if is_ != should:
            raise ValueError(
                f"init.{part}: the weights were made for {field} = {is_}, but the model says "
                f"{should}. Change the model's expert, or take other weights."
            )


def _language_model_tensors(place: str, config: EagleMixConfig) -> dict[str, Tensor]:
    """Tensors of a plain causal LM, under the names that they have in our model."""
    llm = _load_language_model(place)
    text_config: Any = config.text_config
    found, wanted = llm.config.to_dict(), text_config.to_dict()
    for key in sorted(set(found) & set(wanted) - _MAY_DIFFER):
        if found[key] != wanted[key] and not key.startswith("_"):
            raise ValueError(
                f"init.{LANGUAGE_MODEL}: {place} has {key} = {found[key]}, but the model says "
                f"{wanted[key]} (`model.language_model.config`)."
            )
    _grow_vocabulary(llm, text_config.vocab_size, place)
    tensors = {
        f"model.language_model.{name}": value for name, value in llm.base_model.state_dict().items()
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = llm.get_output_embeddings().weight.data
    return tensors


def _load_language_model(place: str) -> PreTrainedModel:
    with quiet_transformers():
        llm, report = AutoModelForCausalLM.from_pretrained(
            place, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    faults = [
        f"{title}: {', '.join(map(str, sorted(report[key])))}"
        for key, title in (
            ("missing_keys", "missing"),
            ("mismatched_keys", "of another shape"),
            ("unexpected_keys", "left over"),
        )
        if report[key]
    ]
    if faults:
        raise ValueError(
            f"init.{LANGUAGE_MODEL}: the weights in {place} do not fit its own config.json.\n"
            + "\n".join(faults)
        )
    return llm


def _grow_vocabulary(llm: PreTrainedModel, size: int, place: str) -> None:
    """Rows for tokens that were added, such as `<image>`: the mean of the others, as LLaVA does."""
    old = llm.get_input_embeddings().weight.shape[0]
    if size < old:
        raise ValueError(
            f"init.{LANGUAGE_MODEL}: {place} has {old} embeddings, more than the model's "
            f"vocabulary of {size}. Set model.language_model.config.vocab_size to at least {old}."
        )
    if size == old:
        return
    llm.resize_token_embeddings(size, mean_resizing=False)
    for layer in {llm.get_input_embeddings(), llm.get_output_embeddings()}:
        layer.weight.data = grow_rows(layer.weight.data[:old], size)


def origin_history(part: str, origin: Origin, seed: int) -> list[str]:
    """What is known of the weights of `part` before the run: see `PartRecord.history`."""
    if origin.kind == "checkpoint":
        return list(read_provenance(Path(origin.place))[part].history)
    if origin.kind == "original":
        return [f"{origin.place}: {origin.original().story}"]
    return [f"random, seed {seed}" if origin.kind == "random" else origin.place]
