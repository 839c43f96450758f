"""What each expert adds to each skill, as plain data: silenced, and trained again without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Literal, Self

from pydantic import Field, model_validator

from eagle_moe.schema import Schema
from eagle_moe.scores.card import check_total, write_json
from eagle_moe.scores.identity import Identity
from eagle_moe.scores.score import TOTAL
from eval.experts.differences import METRICS, Parts, differences, holds_zero, levels
from eval.experts.measure import ALL, LOG_PROB, NONE, Measured, only, variants, without

MATRIX = "experts.json"

Agreement = Literal["yes", "no", "unclear"]


class Run(Schema):
    """A model trained again without an expert, beside one that was trained with it.

    `lost[metric][part]`: the mean of what the second has over the first.
    """

    model: str
    weights_sha256: str
    beside: str
    beside_sha256: str
    lost: dict[str, dict[str, float]]


class Retrained(Schema):
    """`lost[metric]`: what a model has over one trained again without the expert, question by
    question, the mean over `runs`; intervals over questions."""

    runs: list[Run] = Field(min_length=1)
    lost: dict[str, Parts]

    def of_runs(self, metric: str, part: str) -> list[float]:
        """The loss in each run alone."""
        return [run.lost[metric][part] for run in self.runs]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for metric, parts in self.lost.items():
            check_total(parts)
            for part, score in parts.items():
                mean = fmean(self.of_runs(metric, part))
                if not isclose(score.value, mean, abs_tol=1e-9):
                    raise ValueError(
                        f"lost.{metric}.{part} is {score.value:.6f}, but its runs give {mean:.6f}"
                    )
        return self


class Matrix(Schema):
    """What each expert adds.

    - `reference`: questions whose images are the reference set of the mean maps.
    - `scores[variant][metric]`: with no expert silenced (`all`), with one, with all but one
      (`only ...`), with every one (`none`).
    - `leave_one_out[metric][expert]`: `all` minus `without ...`, question by question: what the
      model loses without this expert, while it has the others.
    - `only_one[metric][expert]`: `only ...` minus `none`: what this expert brings by itself.
    - `retrained[expert]`: the same loss after training again without it.
    - `identity`: what produced the measurements; its task's `config_sha256` is of the reference
      images.
    """

    model: str
    experts: list[str] = Field(min_length=2)
    reference: int
    scores: dict[str, dict[str, Parts]]
    leave_one_out: dict[str, dict[str, Parts]]
    only_one: dict[str, dict[str, Parts]]
    retrained: dict[str, Retrained] = {}
    identity: Identity

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        tables = (self.scores, self.leave_one_out, self.only_one)
        rows = chain.from_iterable(table.values() for table in tables)
        for parts in chain.from_iterable(row.values() for row in rows):
            check_total(parts)
        return self

    @property
    def parts(self) -> list[str]:
        """`total`, and the skills."""
        return list(self.scores[ALL][LOG_PROB])

    @property
    def skills(self) -> list[str]:
        return [part for part in self.parts if part != TOTAL]

    def strongest(self, part: str) -> str:
        """The expert whose silence costs the most log-probability."""
        lost = self.leave_one_out[LOG_PROB]
        return max(self.experts, key=lambda name: lost[name][part].value)

    def agreement(self, expert: str, part: str, metric: str) -> Agreement:
        """Whether silencing and training again have the same sign, if both intervals tell one and
        every run has the sign of their mean."""
        silenced = self.leave_one_out[metric][expert][part]
        again = self.retrained[expert].lost[metric][part]
        of_runs = self.retrained[expert].of_runs(metric, part)
        if holds_zero(silenced) or holds_zero(again) or min(of_runs) * max(of_runs) <= 0:
            return "unclear"
        return "yes" if silenced.value * again.value > 0 else "no"

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / MATRIX, self.dump())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        path = Path(folder) / MATRIX
        return cls.parse(json.loads(path.read_text(encoding="utf-8")), str(path))


def make_matrix(
    measured: Sequence[Measured],
    experts: Sequence[str],
    model: str,
    reference: int,
    identity: Identity,
    retrained: Mapping[str, Retrained],
) -> Matrix:
    """Means over items, in total and per skill, and differences item by item."""
    lost = {name: differences(measured, ALL, without(name)) for name in experts}
    brought = {name: differences(measured, only(name), NONE) for name in experts}
    return Matrix(
        model=model,
        experts=list(experts),
        reference=reference,
        scores={variant: levels(measured, variant) for variant in variants(experts)},
        leave_one_out={m: {name: lost[name][m] for name in experts} for m in METRICS},
        only_one={m: {name: brought[name][m] for name in experts} for m in METRICS},
        retrained=dict(retrained),
        identity=identity,
    )
