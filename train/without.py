"""Train a recipe again without one of its experts: what did that expert add?

    python -m train.without RECIPE.yaml --expert NAME [key.sub=value ...] [--redo]

RECIPE may be the `recipe.yaml` in a checkpoint. The stages that prepare experts one by one do not
know of each other, so what RECIPE's own run made there is used again; all later stages run anew,
with the same seed, data and steps, into OUTPUT_DIR/without/NAME. `python -m eval.experts` compares
the result with silencing the expert. Exit status as that of `train.run`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from eagle_moe.schema import nearest
from train.jobs import DirectoryBusy
from train.moved import TrainingFault
from train.recipe import Recipe, load_recipe, parse_recipe
from train.run import run_recipe
from train.search.mixtures import recipe_of
from train.signals import STOP_CODE, Interrupted, is_first_process


def recipe_without(recipe: Recipe, expert: str) -> Recipe:
    """`recipe` without `expert`, starting from what the run of `recipe` made of the others.

    Raises `ValueError` if it has no such expert, or no other one.
    """
    if expert not in recipe.experts:
        raise ValueError(f'{recipe.name}: no expert "{expert}".{nearest(expert, recipe.experts)}')
    if len(recipe.experts) == 1:
        raise ValueError(f"{recipe.name}: {expert} is its only expert: nothing would see.")
    stages = recipe.stages
    made = set(takewhile(lambda name: stages[name].per_expert, stages))
    if made == set(stages):
        raise ValueError(f"{recipe.name}: no stage trains a mixture, so there is none to run anew.")
    others = tuple(name for name in recipe.experts if name != expert)
    data = recipe_of(recipe, others).dump()
    data["stages"] = {name: stage for name, stage in data["stages"].items() if name not in made}
    for stage in data["stages"].values():
        stage["init_from"] = [_made_before(s, made, recipe) for s in stage["init_from"] or ()]
    data["output_dir"] = str(Path(recipe.output_dir, "without", expert))
    return parse_recipe(data, f"{recipe.name} without {expert}")


def _made_before(source: dict[str, Any], made: set[str], recipe: Recipe) -> dict[str, Any]:
    """The source as a folder, if it is one of the stages that are not run again."""
    if source["checkpoint"] not in made:
        return source
    return source | {"checkpoint": str(Path(recipe.output_dir, source["checkpoint"]))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.without`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.without", description="Train again without one expert."
    )
    parser.add_argument("recipe", help="path of the recipe, or of a checkpoint's recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--expert", required=True, help="the one to leave out")
    parser.add_argument("--redo", action="store_true", help="replace results of other settings")
    told = parser.parse_intermixed_args(arguments)
    try:
        recipe = recipe_without(load_recipe(told.recipe, told.overrides), told.expert)
        print(f"without {told.expert}: {run_recipe(recipe, redo=told.redo)}")
        return 0
    except Interrupted as stopped:
        if is_first_process():
            print(stopped.message, file=sys.stderr)
        return STOP_CODE
    except (ValueError, OSError, DirectoryBusy, TrainingFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
