"""A stage as one or several runs, the folders they live in, and what determines their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eagle_moe.build import ModelSpec
from eagle_moe.experts import resolve_expert
from eagle_moe.parts import LANGUAGE_MODEL, all_parts, by_part, resolve_parts
from eagle_moe.schema import nearest
from train.health import HealthRules
from train.recipe import Lora, Recipe, Stage

UNFINISHED = "unfinished"
"""Folder of a run's output in which stages live until they are complete."""

FEATURES = "features"
"""Folder of a run's output that keeps maps of frozen experts."""

WITHOUT_EFFECT = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_timeout",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "project",
        "report_to",
        "run_name",
        "save_steps",
        "save_strategy",
        "save_total_limit",
    }
)
"""Training arguments that change nothing in the weights, so a finished stage stays valid."""


@dataclass(frozen=True)
class StageRun:
    """One training run: a stage, with all experts or, if it fans out, with one of them."""

    recipe: Recipe
    name: str
    expert: str | None = None

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.name]

    @property
    def title(self) -> str:
        """For people: `pre_align/sam`, `sft`."""
        return "/".join(filter(None, (self.name, self.expert)))

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Experts of this run's model, in mixture order."""
        return (self.expert,) if self.expert else self.recipe.experts

    @property
    def parts(self) -> tuple[str, ...]:
        return all_parts(self.experts)

    @property
    def folder(self) -> Path:
        """The checkpoint folder that this run ends in."""
        return Path(self.recipe.output_dir, self.title)

    @property
    def workspace(self) -> Path:
        """Where it lives until then: resume points, logs."""
        return Path(self.recipe.output_dir, UNFINISHED, self.title)

    @property
    def features(self) -> Path:
        """The store of the experts' maps."""
        return Path(self.recipe.features_dir or Path(self.recipe.output_dir, FEATURES))

    @cached_property
    def model_spec(self) -> ModelSpec:
        """The recipe's model with this run's experts and the stage's chat template."""
        spec = self.recipe.model
        changes: dict[str, Any] = {}
        if self.expert:
            named = {resolve_expert(entry).name: entry for entry in spec.experts}
            changes["experts"] = [named[self.expert]]
        if self.stage.template:
            changes["template"] = self.stage.template
        return spec.model_copy(update=changes)

    @property
    def dtype(self) -> str:
        """Of the weights, by torch's name."""
        return self.stage.dtype or self.recipe.dtype

    @property
    def engine(self) -> str:
        """How it is spread over processes, by the name that recipes use."""
        return self.stage.engine or self.recipe.engine

    @property
    def frozen_dtype(self) -> str:
        """Of the parts that do not learn."""
        return self.stage.frozen_dtype or self.recipe.frozen_dtype or self.dtype

    @property
    def trainable(self) -> tuple[str, ...]:
        """Parts whose own weights learn."""
        return self._mine(self.stage.trainable)

    @property
    def lora(self) -> dict[str, Lora]:
        """Parts that learn through adapters."""
        spread = by_part(self.stage.lora, self.recipe.experts)
        return {part: spread[part] for part in self._mine(self.stage.lora)}

    @property
    def health(self) -> HealthRules:
        """What is done about steps that go wrong."""
        stage = self.stage
        return HealthRules(stage.on_nonfinite, stage.max_nonfinite, stage.spike_factor)

    def rates(self, default: float) -> dict[str, float]:
        """Learning rate of each part that learns."""
        rates = self.of_learning_parts(self.stage.lr)
        return {part: rates.get(part, default) for part in (*self.trainable, *self.lora)}

    def of_learning_parts(self, values: Mapping[str, float]) -> dict[str, float]:
        """What a stage gives by part, of the parts that learn in this run."""
        spread = by_part(values, self.recipe.experts)
        learning = (*self.trainable, *self.lora)
        return {part: spread[part] for part in learning if part in spread}

    @property
    def checkpointing(self) -> tuple[str, ...]:
        """Parts whose blocks are recomputed: not `needless_checkpointing`."""
        needless = self.needless_checkpointing
        return tuple(part for part in self._mine(self.stage.checkpointing) if part not in needless)

    @property
    def needless_checkpointing(self) -> tuple[str, ...]:
        """Frozen experts that the stage wants recomputed: as nothing before them learns, they keep
        no activations. A frozen language model does, if what stands before it learns."""
        idle = {*self.parts} - {*self.trainable, *self.lora, LANGUAGE_MODEL}
        return tuple(part for part in self._mine(self.stage.checkpointing) if part in idle)

    def _mine(self, names: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
        chosen = resolve_parts(names, self.recipe.experts, f"stages.{self.name}")
        return tuple(part for part in chosen if part in self.parts)


def stage_runs(recipe: Recipe, name: str, expert: str | None = None) -> list[StageRun]:
    """The runs that a stage consists of, or the one of `expert`.

    Raises `ValueError` with the nearest stage or expert.
    """
    if name not in recipe.stages:
        raise ValueError(f'{recipe.name}: no stage "{name}".{nearest(name, recipe.stages)}')
    if not recipe.stages[name].per_expert:
        if expert is not None:
            raise ValueError(f"{recipe.name}: stage {name} is not `per_expert`, so it has no runs.")
        return [StageRun(recipe, name)]
    if expert is not None and expert not in recipe.experts:
        raise ValueError(f'{recipe.name}: no expert "{expert}".{nearest(expert, recipe.experts)}')
    runs = [StageRun(recipe, name, each) for each in recipe.experts if expert in (None, each)]
    # An expert that a stage does not open has nothing to learn there.
    return [run for run in runs if run.trainable or run.lora]
