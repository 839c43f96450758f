"""Measured items -> means and differences per skill, item by item, with paired intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from eagle_moe.scores.card import ACCURACY, Score
from eagle_moe.scores.score import TOTAL, accuracy_by_skill
from eval.experts.measure import ALL, LOG_PROB, Measured

METRICS = {LOG_PROB: "log-probability of the right answer", ACCURACY: "right answers"}
"""Metric -> what it is. Natural logarithm, the answer's end included; shares of one."""

Parts = dict[str, Score]
"""`{"total": ..., skill: ...}`."""


def holds_zero(score: Score) -> bool:
    """Whether the interval does: then nobody can say which way it goes."""
    assert score.low is not None and score.high is not None
    return score.low <= 0 <= score.high


def levels(measured: Sequence[Measured], variant: str) -> dict[str, Parts]:
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


def differences(measured: Sequence[Measured], variant: str, base: str) -> dict[str, Parts]:
    """Metric -> the mean of a variant less that of another, item by item."""
    return {
        metric: _parts(
            measured, [one.scores[variant][metric] - one.scores[base][metric] for one in measured]
        )
        for metric in METRICS
    }


def compare(pairs: Sequence[tuple[Sequence[Measured], Sequence[Measured]]]) -> dict[str, Parts]:
    """Metric -> what the first of each pair of models has over the second, each with all of its
    experts: item by item, the mean over the pairs."""
    items = pairs[0][0]
    others = [{one.id: one.scores[ALL] for one in second} for _, second in pairs]
    firsts = [{one.id: one.scores[ALL] for one in first} for first, _ in pairs]
    return {
        metric: _parts(
            items,
            [
                fmean(
                    first[item.id][metric] - other[item.id][metric]
                    for first, other in zip(firsts, others, strict=True)
                )
                for item in items
            ],
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
