"""Answers -> numbers: exact match, bootstrap intervals, paired differences, and chance.

Everything here is a pure function of plain values, so that every score can be recounted by hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Self

import numpy as np
from pydantic import model_validator

from eagle_moe.schema import Schema

TOTAL = "total"
"""Key of the mean over all questions, beside the names of the skills."""
CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
"""Of the resampling. The interval of a given file of answers is therefore always the same."""


class Estimate(Schema):
    """A mean over `n` questions with its 95 % interval [`low`, `high`], as fractions of one."""

    mean: float
    low: float
    high: float
    n: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        # a comparison with NaN is false, so this refuses NaN as well
        if not (-1 <= self.low <= self.mean <= self.high <= 1) or self.n < 1:
            raise ValueError("expected -1 <= low <= mean <= high <= 1 and n >= 1")
        return self


def normalise(text: str) -> str:
    """Drop the space around `text` and its case. Nothing else is forgiven."""
    return text.strip().casefold()


def is_correct(prediction: str, answer: str) -> bool:
    """Exact match of the normalised texts."""
    return normalise(prediction) == normalise(answer)


def bootstrap(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Mean of `values` with its percentile bootstrap interval (Efron 1979), 10,000 resamples.

    `bounds` are the least and the greatest value that an item can have. Raises `ValueError` for
    no values and for values outside `bounds` (NaN included).

    When all values are equal, a resample cannot differ and its interval would have no width: 0 of
    20 right would look as certain as 0 of 20,000. The interval is then what `n` draws without a
    single exception allow (Clopper and Pearson 1934 for a count of 0 or n).
    """
    items = np.asarray(values, dtype=np.float64)
    n, (least, greatest) = len(items), bounds
    if n == 0:
        raise ValueError("no values to average: zero questions were answered.")
    if not np.all((items >= least) & (items <= greatest)):
        raise ValueError(f"a score is not a number between {least:g} and {greatest:g}.")
    distinct, counts = np.unique(items, return_counts=True)
    tail = (1 - CONFIDENCE) / 2
    if len(distinct) == 1:
        mean = float(distinct[0])
        exceptions = 1 - tail ** (1 / n)
        low, high = mean - exceptions * (mean - least), mean + exceptions * (greatest - mean)
    else:
        mean = float(counts @ distinct / n)
        # How often each distinct value is drawn is all that the mean of a resample depends on.
        draws = np.random.default_rng(SEED).multinomial(n, counts / n, size=RESAMPLES)
        low, high = np.quantile(draws @ distinct / n, [tail, 1 - tail])
    return Estimate(mean=mean, low=min(float(low), mean), high=max(float(high), mean), n=n)


def accuracy_by_skill(
    skills: Sequence[str],
    values: Sequence[float],
    bounds: tuple[float, float] = (0.0, 1.0),
) -> dict[str, Estimate]:
    """`{"total": ..., skill: ...}` from the skill and the value of every question.

    The total is the mean over questions, not over skills; the built-in suite asks every skill
    equally often, so that the two agree there. Skills keep the order of their first question.
    """
    assert len(skills) == len(values)
    grouped: dict[str, list[float]] = defaultdict(list)
    for skill, value in zip(skills, values, strict=True):
        grouped[skill].append(value)
    if TOTAL in grouped:
        raise ValueError(f'a skill is called "{TOTAL}", the name of the mean over all skills.')
    total = bootstrap(values, bounds)
    return {TOTAL: total} | {skill: bootstrap(part, bounds) for skill, part in grouped.items()}


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], skill_of: Mapping[str, str]
) -> dict[str, Estimate]:
    """Mean of `first` minus mean of `second`, in total and per skill, with intervals.

    Both map question ids to a score from 0 to 1, such as "was right". Questions are resampled, each
    with both of its outcomes: two models find the same questions hard, and the interval of the
    difference is narrower than the two separate intervals suggest. Raises `ValueError` if the
    questions are not the same.
    """
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"the two models did not answer the same questions: {len(odd)} are on one side only, "
            f'such as "{odd[0]}". Evaluate both on the same data.'
        )
    ids = list(first)
    values = [float(first[key]) - float(second[key]) for key in ids]
    return accuracy_by_skill([skill_of[key] for key in ids], values, bounds=(-1.0, 1.0))


def chance_of(answer: str, kind: str, answers_by_kind: Mapping[str, Collection[str]]) -> float:
    """Probability that a guesser who saw no image gives `answer` to a question of `kind`.

    The guesser knows which distinct (normalised) answers questions of that kind had in the
    training data, and draws one of them uniformly. So the exact expectation is one over their
    number if `answer` is among them and 0 otherwise; no sampling noise is added.
    """
    known = answers_by_kind.get(kind)
    if not known:
        raise ValueError(
            f'chance: no training answer to a question of kind "{kind}". '
            "The training and the test file are not of the same suite."
        )
    return 1 / len(known) if normalise(answer) in known else 0.0
