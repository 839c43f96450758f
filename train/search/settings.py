"""A search in a YAML file (`configs/search`); docs/search.md is the guide to its fields.

settings = load_settings("configs/search/mini.yaml", ["rule.level=0.95", "seeds=[0,1,2]"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from eagle_moe.schema import Schema, load_yaml, nearest
from train.recipe import Recipe, load_recipe
from train.search.executors import ExecutorSettings
from train.search.halving import Halving
from train.search.pool import Pool
from train.search.rules import RULES, Rule
from train.search.strategies import Backward, Exhaustive, Greedy, Random, Strategy

AUTO = "auto"
STRATEGIES: dict[str, type] = {each.name: each for each in (Greedy, Backward, Exhaustive, Random)}


class MaterialPlace(Schema):
    """What a mini search starts from (`train.material`); it is made where it is missing.

    - `sizes`: a file of `configs/demo`.
    - `root`: the folder that takes it. `make demo` and searches may share one.
    """

    sizes: str
    root: str


class EvaluationSettings(Schema):
    """How a trial is scored (`eval.run.evaluate`).

    - `data`: folder of a suite, or a file like its `test.jsonl`. Default: the material's suite.
    - `limit`: ask only that many questions, taken from the skills in turn.
    """

    data: str | None = None
    limit: int | None = Field(None, gt=0)
    batch_size: int = Field(16, gt=0)
    max_new_tokens: int = Field(16, gt=0)


class SearchSettings(Schema):
    """All of a search. Fields of `WITHOUT_EFFECT` change no result."""

    name: str
    recipe: str
    overrides: list[str] = []
    """Of the recipe, in every trial."""
    pool: list[str] = []
    """Experts to choose from, in mixture order; default: the recipe's."""
    base: list[str] = []
    """What a search starts from, and what every mixture contains."""
    strategy: dict[str, Any] = {"kind": "greedy"}
    rule: dict[str, Any] = {"kind": "noise_aware"}
    halving: dict[str, Any] | None = None
    """Cheap trials first: `budgets`, shares of the steps, and the share to `keep` after each."""
    seeds: list[int] = Field([0], min_length=1)
    """Of everything after pre-alignment. How many are used is up to the rule."""
    evaluation: EvaluationSettings = EvaluationSettings()
    reuse: bool = True
    """False: every trial does all its stages by itself. To measure what sharing saves."""
    features: Literal["auto", "on", "off"] = "auto"
    """Keep maps of frozen experts on disk (`cache_features`) in stages that train mixtures."""
    code: str = AUTO
    """What counts as the version of the code: `auto`, a hash of it, or any word, which says that
    results of all code under this word are the same."""
    material: MaterialPlace | None = None
    store: str = "runs/store"
    """Folder of pre-aligned experts and feature maps, shared by searches."""
    keep: Literal["chosen", "all"] = "chosen"
    """Checkpoints of mixtures that stay: those of the chosen mixture, or all."""
    gpus_per_trial: int = Field(0, ge=0)
    """GPUs of a training job; more than one are joined by torchrun."""
    threads: int = Field(1, gt=0)
    """Compute threads of a job."""
    executor: ExecutorSettings = ExecutorSettings()

    @field_validator("strategy", "rule", "halving", mode="before")
    @classmethod
    def _long_form(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice: it would count as independent evidence")
        return seeds

    @model_validator(mode="after")
    def _parts(self) -> Self:
        self.make_strategy()
        self.make_rule()
        self.make_halving()
        if self.evaluation.data is None and self.material is None:
            raise ValueError("`evaluation.data`: say on which questions mixtures are scored")
        return self

    def make_strategy(self) -> Strategy:
        strategy: Strategy = _of_kind(self.strategy, STRATEGIES, "strategy")
        return strategy

    def make_rule(self) -> Rule:
        rule: Rule = _of_kind(self.rule, RULES, "rule")
        return rule

    def make_halving(self) -> Halving | None:
        return None if self.halving is None else _make(Halving, self.halving, "halving")

    def make_pool(self, recipe: Recipe) -> Pool:
        """The pool. Raises `ValueError` naming the expert that is twice in it or unknown."""
        names = tuple(self.pool or recipe.experts)
        for name in names:
            if name not in recipe.experts:
                raise ValueError(
                    f'pool: "{name}" is not an expert of {self.recipe}.'
                    f"{nearest(name, recipe.experts)}"
                )
        return Pool(names, tuple(self.base))


WITHOUT_EFFECT = frozenset(
    {"name", "material", "store", "keep", "threads", "executor", "recipe", "overrides", "code"}
)
"""Fields that change no result, or do so through the recipe that they lead to."""


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> SearchSettings:
    """Read a search and apply `key.sub=value` overrides.

    Raises `FileNotFoundError` or `ValueError` naming the file, the field and the nearest name.
    """
    return SearchSettings.parse(load_yaml(path, overrides), str(path))


def load_search_recipe(settings: SearchSettings, material: Sequence[str] = ()) -> Recipe:
    """The recipe of the search; `material`: overrides that say where its material is."""
    return load_recipe(settings.recipe, [*material, *settings.overrides])


def _of_kind(given: Mapping[str, Any], kinds: Mapping[str, type], field: str) -> Any:
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f'{field}.kind: "{kind}".{nearest(str(kind), kinds)}')
    return _make(kinds[kind], {k: v for k, v in given.items() if k != "kind"}, field)


def _make(made: type, given: Mapping[str, Any], field: str) -> Any:
    known = [each.name for each in dataclasses.fields(made)]
    for name in given:
        if name not in known:
            raise ValueError(f"{field}: unknown key `{name}`.{nearest(name, known)}")
    try:
        return TypeAdapter(made).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (field, *first["loc"]))
        raise ValueError(f"`{where}`: {first['msg']}") from None
