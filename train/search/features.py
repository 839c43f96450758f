"""Whether the stages of a search keep maps of frozen experts on disk (`cache_features`)."""

from __future__ import annotations

from collections.abc import Mapping

from eagle_moe.schema import Schema
from train.plan.features import learning_experts, plan_features
from train.recipe import Recipe, parse_recipe
from train.search.inputs import SearchInputs


class FeatureChoice(Schema):
    """Stages that keep maps, and why these: a sentence for each stage that could."""

    stages: list[str]
    reasons: list[str]


def choose_features(inputs: SearchInputs) -> FeatureChoice:
    """Decide by the search's `features`: `auto` asks the plan of each stage whether it pays.

    Raises `ValueError` if it is `on` and no stage leaves all experts frozen.
    """
    told, stages, reasons = inputs.settings.features, [], []
    for name, stage in inputs.recipe.stages.items():
        run = inputs.whole(name)
        if stage.per_expert or stage.cache_features or learning_experts(run):
            continue
        if told == "off":
            continue
        if inputs.settings.gpus_per_trial > 1:
            reasons.append(f"{name}: no feature cache, which works in one process only.")
            continue
        if told == "on":
            stages.append(name)
            reasons.append(f"{name}: maps of frozen experts are kept, as the settings say.")
            continue
        plan = plan_features(run, runs=_times_needed(inputs))
        reasons.append(plan.told)
        if plan.refusal is None:
            stages.append(name)
    if told == "on" and not stages:
        raise ValueError(
            "features: on, but no stage that trains mixtures leaves all experts frozen."
        )
    return FeatureChoice(stages=stages, reasons=reasons)


def _times_needed(inputs: SearchInputs) -> Mapping[str, int]:
    """Expert -> trials that will need its maps, if the search stops as early as it can.

    The base is in every mixture; each other expert is tried once, and once more beside what the
    first round has chosen.
    """
    pool = inputs.pool
    others = len(pool.names) - len(pool.base)
    whole = 1 + others + max(others - 1, 0)
    return {name: whole if name in pool.base else min(2, whole) for name in pool.names}


def with_features(recipe: Recipe, choice: FeatureChoice) -> Recipe:
    """`recipe` with maps kept in the chosen stages."""
    data = recipe.dump()
    for name in choice.stages:
        data["stages"][name]["cache_features"] = True
    return parse_recipe(data, recipe.name)
