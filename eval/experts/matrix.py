"""Measured items -> what each expert adds to each skill, with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, Self

from pydantic import Field

from eagle_moe.schema import Schema
from eagle_moe.scores.card import ACCURACY, Score, write_json
from eagle_moe.scores.identity import Identity
from eagle_moe.scores.score import TOTAL, accuracy_by_skill
from eval.experts.measure import ALL, LOG_PROB, NONE, Measured, only, variants, without

MATRIX = "experts.json"
METRICS = {LOG_PROB: "log-probability of the right answer", ACCURACY: "right answers"}
"""Metric -> what it is. Natural logarithm, the answer's end included; shares of one."""

Agreement = Literal["yes", "no", "unclear"]
Parts = dict[str, Score]
"""`{"total": ..., skill: ...}`."""


class Retrained(Schema):
    """A model trained again without an expert: `lost[metric]` is what the first one has over it,
    question by question."""

    model: str
    weights_sha256: str
    lost: dict[str, Parts]


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
        """Whether silencing and training again have the same sign, if both intervals tell one."""
        silenced = self.leave_one_out[metric][expert][part]
        again = self.retrained[expert].lost[metric][part]
        if holds_zero(silenced) or holds_zero(again):
            return "unclear"
        return "yes" if silenced.value * again.value > 0 else "no"

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / MATRIX, self.dump())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        path = Path(folder) / MATRIX
        return cls.parse(json.loads(path.read_text(encoding="utf-8")), str(path))


def holds_zero(score: Score) -> bool:
    """Whether the interval does: then nobody can say which way it goes."""
    assert score.low is not None and score.high is not None
    return score.low <= 0 <= score.high


def make_matrix(
    measured: Sequence[Measured],
    experts: Sequence[str],
    model: str,
    reference: int,
    identity: Identity,
    retrained: Mapping[str, Retrained],
) -> Matrix:
    """Means over items, in total and per skill, and differences item by item."""

    lost = {name: _differences(measured, ALL, without(name)) for name in experts}
    brought = {name: _differences(measured, only(name), NONE) for name in experts}
    return Matrix(
        model=model,
        experts=list(experts),
        reference=reference,
        scores={variant: _levels(measured, variant) for variant in variants(experts)},
        leave_one_out={m: {name: lost[name][m] for name in experts} for m in METRICS},
        only_one={m: {name: brought[name][m] for name in experts} for m in METRICS},
        retrained=dict(retrained),
        identity=identity,
    )


def compare(first: Sequence[Measured], second: Sequence[Measured]) -> dict[str, Parts]:
    """What the first model has over the second on the same items, each with all of its experts."""
    other = {one.id: one.scores[ALL] for one in second}
    return {
        metric: _parts(first, [one.scores[ALL][metric] - other[one.id][metric] for one in first])
        for metric in METRICS
    }


def _levels(measured: Sequence[Measured], variant: str) -> dict[str, Parts]:
    """Metric -> its mean under a variant, without an interval: differences are what counts."""
    parts: dict[str, list[Measured]] = {TOTAL: list(measured)}
    for one in measured:
        parts.setdefault(one.skill, []).append(one)
    return {
        metric: {
            part: Score(value=fmean(one.scores[variant][metric] for one in ones), n=len(ones))
            for part, ones in parts.items()
        }
        for metric in METRICS
    }


def _differences(measured: Sequence[Measured], variant: str, base: str) -> dict[str, Parts]:
    """Metric -> the mean of a variant less that of another, item by item."""
    return {
        metric: _parts(
            measured, [one.scores[variant][metric] - one.scores[base][metric] for one in measured]
        )
        for metric in METRICS
    }


def _parts(measured: Sequence[Measured], values: Sequence[float]) -> Parts:
    """Means of differences with paired bootstrap intervals, in total and per skill."""
    unit = max(1.0, *map(abs, values))  # log-probabilities are not between -1 and 1
    scaled = [value / unit for value in values]
    found = accuracy_by_skill([one.skill for one in measured], scaled, (-1.0, 1.0))
    return {
        part: Score(value=unit * e.mean, low=unit * e.low, high=unit * e.high, n=e.n)
        for part, e in found.items()
    }
