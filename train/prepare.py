"""Before the first step: what a run trains with, put together as its stage says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from eagle_moe.build import build_config, build_model, build_processor, load_tokenizer
from eagle_moe.config import EagleMixConfig
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.parts import part_modules
from eagle_moe.processor import EagleMixProcessor
from train.arguments import training_arguments
from train.data import (
    Collator,
    ConversationDataset,
    MixtureDataset,
    PackedDataset,
    check_keeps_apart,
    check_supervision,
)
from train.features import FeatureCollator, FeatureDataset, FeatureStore
from train.learning import open_parts
from train.lora import add_lora
from train.quantize import require_bitsandbytes
from train.recompute import recompute_blocks
from train.sources import Origin, check_sources
from train.stages import StageRun
from train.tasks import check_tasks
from train.weights import load_model

if TYPE_CHECKING:
    from peft import PeftModel


def check_start(runs: Sequence[StageRun]) -> None:
    """Everything that can be known to fail fails here, before anything is loaded or spent.

    Raises `ValueError` or `FileNotFoundError` that name the stage or the data set.
    """
    check_sources(runs)
    for run in runs:
        training_arguments(run)
        check_tasks(run)
        if any(lora.quantize for lora in run.lora.values()):
            require_bitsandbytes()
        for name in run.stage.all_data:
            try:
                run.recipe.data[name].check_files()
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"{run.recipe.name}: data.{name}: {error}") from None


@dataclass(frozen=True)
class Prepared:
    """What a run trains with, before the trainer has it."""

    processor: EagleMixProcessor
    dataset: MixtureDataset | PackedDataset
    """What it learns from."""
    held_out: ConversationDataset | None
    """What it is evaluated on meanwhile."""
    model: EagleMixForConditionalGeneration
    adapters: PeftModel | None

    def collator(self, run: StageRun, device: torch.device) -> Collator:
        """Samples -> batch; if the experts' maps are kept on disk, they are all there afterwards.

        `device`: where maps that are not there yet are computed.
        """
        if not run.stage.cache_features:
            return Collator(self.processor)
        towers = self.model.model.vision_tower.towers.to(device)
        store = FeatureStore(run.features, towers, self.processor.image_processor)
        datasets = [*self.dataset.parts, *([self.held_out] if self.held_out else [])]
        store.fill([each for each in datasets if isinstance(each, FeatureDataset)], run.title)
        return FeatureCollator(self.processor, store)


def prepare(run: StageRun, origins: Mapping[str, Origin]) -> Prepared:
    """Processor, data, and the model with the weights of `origins`, open where the run trains it.

    Raises `ValueError` for samples, weights or a language model that do not fit the run.
    """
    processor, config = _build(run)
    dataset, held_out = _data(run, processor)
    model = load_model(run, config, origins)
    if run.stage.packing:
        check_keeps_apart(model.model.language_model)
    return Prepared(processor, dataset, held_out, model, _open(run, model))


def empty_model(run: StageRun) -> tuple[EagleMixForConditionalGeneration, PeftModel | None]:
    """The run's model and adapters without weights."""
    with torch.device("meta"):
        model = build_model(_build(run)[1])
        return model, _open(run, model)


def _build(run: StageRun) -> tuple[EagleMixProcessor, EagleMixConfig]:
    tokenizer = load_tokenizer(run.model_spec)
    processor = build_processor(run.model_spec, tokenizer)
    return processor, build_config(run.model_spec, processor.image_token_id)


def _data(
    run: StageRun, processor: EagleMixProcessor
) -> tuple[MixtureDataset | PackedDataset, ConversationDataset | None]:
    """What the run learns from, and what it is evaluated on while it does."""
    stage, data = run.stage, run.recipe.data
    kind = FeatureDataset if stage.cache_features else ConversationDataset
    parts = [kind(data[name], processor, stage.max_length) for name in stage.data]
    mixture = MixtureDataset(parts, run.recipe.seed)
    whole = stage.packing or stage.length_aware
    seen = check_supervision(mixture, stage.max_unsupervised, whole=whole)
    print(f"{run.title}: {seen.told}")
    if stage.length_aware:
        mixture.sort_by_work()
    held_out = kind(data[stage.eval.data], processor, stage.max_length) if stage.eval else None
    if not stage.packing:
        return mixture, held_out
    packed = PackedDataset(mixture, stage.max_length)
    print(f"{run.title}: {packed.told}")
    return packed, held_out


def _open(run: StageRun, model: nn.Module) -> PeftModel | None:
    """Let learn what the stage says, and nothing else; the adapters, if there are any."""
    model.requires_grad_(False)
    mixed = bool(run.stage.args.get("bf16"))
    adapters = add_lora(model, run.lora, torch.bfloat16 if mixed else getattr(torch, run.dtype))
    open_parts(model, run.trainable)
    for part in set(run.parts) - set(run.trainable) - set(run.lora):
        for module in part_modules(model, part):
            module.to(getattr(torch, run.frozen_dtype))
    recompute_blocks(model, run.checkpointing)
    return adapters
