"""The recipe of one trial: the search's recipe with some of its experts, a seed, a share of steps.

Part names of experts that are not there are left out wherever a stage lists them, so that the
recipe of a mixture is what a person would have written for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eagle_moe.experts import resolve_expert
from eagle_moe.parts import EXPERTS, expert_part
from train.recipe import Recipe, parse_recipe
from train.search.trial import Members

_STEP_COUNTS = ("num_decay_steps", "num_stable_steps", "num_warmup_steps")
"""Options of schedules that are numbers of steps (transformers.optimization)."""


def recipe_of(recipe: Recipe, members: Members) -> Recipe:
    """`recipe` with the experts `members` alone, in this order.

    A `per_expert` stage that opens none of them is left out. Raises `ValueError` naming the stage
    if nothing in it learns without the others.
    """
    data = recipe.dump()
    entries = {resolve_expert(entry).name: entry for entry in data["model"]["experts"]}
    data["model"]["experts"] = [entries[name] for name in members]
    data["init"]["experts"] = _of(data["init"]["experts"], members)
    gone = {expert_part(name) for name in entries if name not in members}
    for name, stage in list(data["stages"].items()):
        for field in ("trainable", "checkpointing"):
            stage[field] = [part for part in stage[field] if part not in gone]
        for field in ("lora", "lr", "weight_decay", "layer_decay"):
            stage[field] = {k: v for k, v in stage[field].items() if k not in gone}
        stage["init_from"] = _sources(stage["init_from"], gone, data["stages"])
        opened = [*stage["trainable"], *stage["lora"]]
        if stage["per_expert"] and not any(part.startswith(EXPERTS) for part in opened):
            del data["stages"][name]
    return parse_recipe(data, f"{recipe.name} with {'+'.join(members)}")


def _of(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _sources(sources: list[Any] | None, gone: set[str], stages: dict[str, Any]) -> list[Any] | None:
    """`init_from` without experts that are `gone`, and without stages that were left out."""
    if sources is None:
        return None
    kept = []
    for source in sources:
        place = source if isinstance(source, str) else source["checkpoint"]
        parts = None if isinstance(source, str) else source["parts"]
        if "/" not in place and place not in stages:
            continue
        if parts is not None:
            parts = [part for part in parts if part not in gone]
            if not parts:
                continue
        kept.append({"checkpoint": place, "parts": parts})
    return kept


def seeded(recipe: Recipe, seed: int, budget: float) -> Recipe:
    """`recipe` with this seed and a share `budget` of the steps of the stages that train it.

    What counts in steps (warm-up, decay) shrinks with them. Stages that prepare experts stay.
    """
    data = recipe.dump() | {"seed": seed}
    if budget != 1:
        for stage in data["stages"].values():
            if not stage["per_expert"]:
                stage["args"] = _shortened(stage["args"], budget)
    return parse_recipe(data, f"{recipe.name} with seed {seed}")


def _shortened(args: dict[str, Any], budget: float) -> dict[str, Any]:
    def share(count: float) -> int:
        return max(1, round(count * budget))

    short = dict(args)
    if args.get("max_steps", -1) > 0:
        short["max_steps"] = share(args["max_steps"])
    else:
        short["num_train_epochs"] = args.get("num_train_epochs", 3) * budget  # theirs is 3
    if args.get("warmup_steps", 0) >= 1:  # below 1 it is a share of all steps
        short["warmup_steps"] = share(args["warmup_steps"])
    schedule = dict(args.get("lr_scheduler_kwargs") or {})
    for name in _STEP_COUNTS:
        if name in schedule:
            schedule[name] = share(schedule[name])
    return short | ({"lr_scheduler_kwargs": schedule} if schedule else {})
