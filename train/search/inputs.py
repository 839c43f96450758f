"""What a search works with, put together from its settings and checked before anything is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.schema import load_yaml
from train.demo import DemoSettings
from train.jobs import Job
from train.jobs.directory import read_record
from train.jobs.graph import fingerprints
from train.material import Material
from train.prepare import check_start
from train.recipe import Recipe
from train.search.mixtures import recipe_of
from train.search.pool import Pool
from train.search.settings import SearchSettings, load_search_recipe
from train.stages import StageRun, stage_runs


@dataclass(frozen=True)
class SearchInputs:
    """Settings with nothing left to guess, the recipe of the whole pool, and the pool.

    `material`: jobs that make what the recipe starts from; none if that is up to the person.
    """

    settings: SearchSettings
    recipe: Recipe
    pool: Pool
    material: tuple[Job, ...] = ()

    def whole(self, name: str) -> StageRun:
        """The run of a stage that trains the mixture of the whole pool."""
        return StageRun(self.recipe, name)

    def check_files(self) -> None:
        """Raise `ValueError` or `FileNotFoundError` if weights or data are missing."""
        check_start([run for name in self.recipe.stages for run in stage_runs(self.recipe, name)])


def resolve(settings: SearchSettings) -> SearchInputs:
    """Read what `settings` name. No weights, no data, no download.

    Raises `ValueError` naming the field, the expert and the remedy: also for an expert that cannot
    be built, and for a mixture whose recipe makes no sense.
    """
    material = _material(settings)
    recipe = load_search_recipe(settings, _overrides(material))
    pool = settings.make_pool(recipe)
    if settings.evaluation.data is None:
        assert material is not None
        suite = settings.evaluation.model_copy(update={"data": str(material.suite)})
        settings = settings.model_copy(update={"evaluation": suite})
    features = {"features_dir": recipe.features_dir or str(Path(settings.store, "features"))}
    whole = recipe_of(recipe, pool.names).model_copy(update=features)
    _check_buildable(whole)
    for name in pool.names:
        recipe_of(whole, (name,))
    return SearchInputs(settings, whole, pool, tuple(material.jobs() if material else ()))


def _material(settings: SearchSettings) -> Material | None:
    place = settings.material
    if place is None:
        return None
    return Material(DemoSettings.parse(load_yaml(place.sizes), place.sizes), Path(place.root))


def _overrides(material: Material | None) -> list[str]:
    if material is None:
        return []
    return [*material.overrides(), material.init_experts(list(material.settings.pretexts))]


def unfinished(jobs: Sequence[Job]) -> bool:
    """Whether one of these has yet to be made. Takes no lock: others may use what is there."""
    prints = fingerprints(jobs)
    for job in jobs:
        record = read_record(job.directory)
        if record is None or (record.fingerprint, record.status) != (prints[job.name], "finished"):
            return True
    return False


def _check_buildable(recipe: Recipe) -> None:
    """Build every expert without weights."""
    for spec in map(resolve_expert, recipe.model.experts):
        try:
            with torch.device("meta"):
                build_expert(spec)
        except Exception as error:  # whatever a backend raises, it is this expert's
            raise ValueError(
                f"pool: `{spec.name}` cannot be built: {type(error).__name__}: {error} "
                "Mend its entry in the model, or take it out of `pool`."
            ) from error
