"""Train a recipe's mixture again: without one of its experts, with another seed, or both.

    python -m train.again RECIPE.yaml [--without EXPERT] [--seed N] [key.sub=value ...] [--redo]

RECIPE may be the `recipe.yaml` in a checkpoint. The stages that prepare experts one by one do not
know of each other, so what RECIPE's own run made there is used again; all later stages run anew,
with the same data and steps, into OUTPUT_DIR/again/without-EXPERT/seed-N (or again/all/seed-N).
`python -m eval.experts` compares the results with silencing the expert. Exit status as that of
`train.run`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from eagle_moe.schema import nearest
from train.recipe import Recipe, load_recipe, parse_recipe
from train.run import exit_status, run_recipe
from train.search.mixtures import recipe_of


def recipe_again(recipe: Recipe, without: str | None = None, seed: int | None = None) -> Recipe:
    """`recipe` without that expert and with that seed (default: its own), starting from what its
    own run made of the experts.

    Raises `ValueError` if nothing would be different, if it has no such expert, or no other one.
    """
    seed = recipe.seed if seed is None else seed
    if without is None and seed == recipe.seed:
        raise ValueError(
            f"{recipe.name}: its seed is {seed}, so that would be the same run. Give another "
            "--seed, or an expert to leave out: --without EXPERT."
        )
    stages = recipe.stages
    made = set(takewhile(lambda name: stages[name].per_expert, stages))
    if made == set(stages):
        raise ValueError(f"{recipe.name}: no stage trains a mixture, so there is none to run anew.")
    data = recipe_of(recipe, _others(recipe, without)).dump()
    data["stages"] = {name: stage for name, stage in data["stages"].items() if name not in made}
    for stage in data["stages"].values():
        stage["init_from"] = [_made_before(s, made, recipe) for s in stage["init_from"] or ()]
    mixture = "all" if without is None else f"without-{without}"
    data["seed"] = seed
    data["output_dir"] = str(Path(recipe.output_dir, "again", mixture, f"seed-{seed}"))
    return parse_recipe(data, f"{recipe.name} again, {mixture}, seed {seed}")


def _others(recipe: Recipe, without: str | None) -> tuple[str, ...]:
    """The experts that stay, in mixture order."""
    if without is None:
        return recipe.experts
    if without not in recipe.experts:
        raise ValueError(f'{recipe.name}: no expert "{without}".{nearest(without, recipe.experts)}')
    if len(recipe.experts) == 1:
        raise ValueError(f"{recipe.name}: {without} is its only expert: nothing would see.")
    return tuple(name for name in recipe.experts if name != without)


def _made_before(source: dict[str, Any], made: set[str], recipe: Recipe) -> dict[str, Any]:
    """The source as a folder, if it is one of the stages that are not run again."""
    if source["checkpoint"] not in made:
        return source
    return source | {"checkpoint": str(Path(recipe.output_dir, source["checkpoint"]))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.again`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.again",
        description="Train a mixture again, without one expert or with another seed.",
    )
    parser.add_argument("recipe", help="path of the recipe, or of a checkpoint's recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--without", metavar="EXPERT", help="the expert to leave out")
    parser.add_argument("--seed", type=int, help="of all that is trained anew; default: the same")
    parser.add_argument("--redo", action="store_true", help="replace results of other settings")
    told = parser.parse_intermixed_args(arguments)

    def train() -> int:
        recipe = recipe_again(load_recipe(told.recipe, told.overrides), told.without, told.seed)
        print(f"trained again: {run_recipe(recipe, redo=told.redo)}")
        return 0

    return exit_status(train)


if __name__ == "__main__":
    sys.exit(main())
