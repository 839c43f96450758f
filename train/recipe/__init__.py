"""A recipe: one YAML file that says everything about a run. A stage of it is data, not code.

    recipe = load_recipe("configs/recipes/mini.yaml", ["stages.sft.args.max_steps=10"])

`schema` is what it may say, `read` puts it together from files and overrides, `check` looks at it
whole (names of parts, experts, data, stages, training arguments), so that a typo costs nothing. No
weights are touched and nothing is downloaded.
"""

from train.recipe.read import load_recipe, parse_recipe
from train.recipe.schema import (
    RANDOM,
    Ema,
    Evaluation,
    Init,
    Lora,
    Recipe,
    Source,
    Stage,
    TaskEvaluation,
)

__all__ = [
    "RANDOM",
    "Ema",
    "Evaluation",
    "Init",
    "Lora",
    "Recipe",
    "Source",
    "Stage",
    "TaskEvaluation",
    "load_recipe",
    "parse_recipe",
]
